"""Kills at any moment cost work, never samples, steps or the shape of the loss curve.

Every test compares the curve of a run that was disturbed with that of the same run, undisturbed, in one process.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cl import storage
from cl.config import parse_config
from cl.training.config import TrainConfig
from cl.training.metrics import read_metrics
from cl.training.run import train
from tests.training_corpus import tiny_run, write_corpus
from tests.training_process import TrainProcess

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

STEPS, EVERY = 240, 20
FIELDS: dict[str, Any] = {
    "steps": STEPS,
    "checkpoint": {"every_steps": EVERY},
    "optimizer": {"lr": 3e-4},
    "workers": {"count": 2},
}
Start = Callable[..., TrainProcess]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "squares")


@pytest.fixture(scope="module")
def undisturbed(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of the run, by one process without Ray."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(parse_config(TrainConfig, tiny_run(corpus, out, **FIELDS | {"workers": {"count": 0}}), "test"))
    return read_metrics(out / "metrics.jsonl")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[TrainProcess] = []

    def begin(fields: dict[str, Any], *words: str) -> TrainProcess:
        started.append(TrainProcess(tmp_path, fields, *words))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def assert_same_curve(out: Path, undisturbed: list[dict[str, Any]]) -> None:
    records = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for ours, theirs in zip(records, undisturbed, strict=True):
        assert ours["samples"] == theirs["samples"]
        # Two workers add in another order than one; the difference grows a little with each step.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-7)


def test_killed_worker_is_replaced(
    corpus: str, tmp_path: Path, undisturbed: list[dict[str, Any]], start: Start
) -> None:
    out = tmp_path / "run"
    run = start(tiny_run(corpus, out, **FIELDS))
    run.wait_for(lambda: run.step() >= 2 * EVERY + 3)
    workers = run.workers()
    assert len(workers) == 2
    workers[1].kill()
    assert run.finish() == 0, run.stderr
    summary = storage.read_json(str(out / "summary.json"))
    assert (summary["steps"], summary["workers"]) == (STEPS, 2)
    assert summary["resumed_from"] >= 2 * EVERY
    assert summary["resumed_from"] % EVERY == 0
    assert f"Going on from step {summary['resumed_from']}" in run.stderr
    assert_same_curve(out, undisturbed)
    assert run.left() == []


def test_interrupted_run_leaves_nothing_and_goes_on(
    corpus: str, tmp_path: Path, undisturbed: list[dict[str, Any]], start: Start
) -> None:
    out = tmp_path / "run"
    fields = tiny_run(corpus, out, **FIELDS)
    run = start(fields)
    run.wait_for(lambda: run.step() >= EVERY + 3)
    run.remember()
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130, run.stderr
    assert "clew train train.yaml --resume" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.left() == []
    assert storage.read_json(str(out / "run.json"))["status"] == "interrupted"
    assert run.step() < STEPS

    again = start(fields, "--resume")
    assert again.finish() == 0, again.stderr
    assert_same_curve(out, undisturbed)


def test_a_worker_that_hangs_is_named_and_replaced(
    corpus: str, tmp_path: Path, undisturbed: list[dict[str, Any]], start: Start
) -> None:
    """A stopped process keeps its connections: only time tells that it will not come."""
    out = tmp_path / "run"
    patience = {"count": 2, "stall_seconds": 3, "timeout_seconds": 10}
    run = start(tiny_run(corpus, out, **FIELDS | {"workers": patience}))
    run.wait_for(lambda: run.step() >= EVERY + 3)
    stopped = run.workers()[1]
    stopped.suspend()
    assert run.finish() == 0, run.stderr
    assert f"(process {stopped.pid} on " in run.stderr.split("does not answer")[0].rsplit("Step", 1)[1]
    assert "waits for the others in cl/" in run.stderr
    assert storage.read_json(str(out / "summary.json"))["resumed_from"] >= EVERY
    assert_same_curve(out, undisturbed)
    assert run.left() == []


def test_killed_driver_and_resume(corpus: str, tmp_path: Path, undisturbed: list[dict[str, Any]], start: Start) -> None:
    out = tmp_path / "run"
    fields = tiny_run(corpus, out, **FIELDS)
    run = start(fields)
    run.wait_for(lambda: run.step() >= EVERY + 3)
    run.remember()
    run.process.kill()
    run.finish()
    # Its workers notice that it is gone. (Ray's own agents may outlive a driver that had no chance to stop them.)
    assert [name for name in run.left() if "Train" in name] == []
    assert run.step() < STEPS

    refused = start(fields)
    assert refused.finish() == 2
    assert "--resume" in refused.stderr

    again = start(fields, "--resume")
    assert again.finish() == 0, again.stderr
    assert_same_curve(out, undisturbed)
