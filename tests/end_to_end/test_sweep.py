"""`sweep` through real Ray Tune: early stopping, a killed driver, trials that fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cl import storage
from cl.config import parse_config
from cl.errors import ClewError, ConfigError
from cl.sweeps.config import SweepConfig
from cl.sweeps.result import TrialResult
from cl.sweeps.run import sweep
from tests.end_to_end.clew import PATIENCE
from tests.end_to_end.small_corpora import write_text_corpus

TEXT_TOWER = {
    "family": "open_clip",
    "part": "text",
    "config": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
# With this rate the embeddings spread over the sphere at once; with the other they stay where they were.
FAST, FROZEN = 1e-2, 1e-12


def sweep_tree(folder: Path, **fields: Any) -> dict[str, Any]:
    """A sweep of three trials of eight steps each; every file it needs is made."""
    corpus = write_text_corpus(folder / "corpus", [(f"number {i}", f"{i} apples and pears") for i in range(64)])
    train = {
        "out": "unused",
        "corpus": corpus,
        "model": {"embed_dim": 8, "towers": {"text": TEXT_TOWER}, "views": {"anchor": "text", "positive": "text"}},
        "batch_size": 16,
        "steps": 1,
        "precision": "fp32",
        "workers": {"count": 0},
        "loader": {"threads": 1},
        "log_every": 1,
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(train))
    return {
        "base": str(folder / "train.yaml"),
        "train": {"seed": 1},
        "space": {"optimizer.lr": {"choice": [FAST, FROZEN, FROZEN / 2]}},
        "samples": 128,
        "evaluations": 4,
        "validation": {"val": corpus},
        "metric": "uniformity/anchor",
        "concurrency": 1,
        "out": str(folder / "sweep"),
        **fields,
    }


def make(folder: Path, **fields: Any) -> SweepConfig:
    return parse_config(SweepConfig, sweep_tree(folder, **fields), "test")


def trial_files(out: Path) -> dict[str, TrialResult]:
    paths = sorted((out / "trials").glob("*/trial.json"))
    return {path.parent.name: TrialResult.model_validate(storage.read_json(str(path))) for path in paths}


@pytest.mark.slow
def test_asha_stops_what_is_behind_and_a_finished_sweep_is_only_read(tmp_path: Path) -> None:
    cfg = make(tmp_path, scheduler={"name": "asha", "grace": 2})
    result = sweep(cfg)
    assert (result.mode, result.axes, len(result.trials)) == ("min", ["optimizer.lr"], 3)
    assert result.chance is not None
    assert result.best is not None
    assert result.best.parameters["optimizer.lr"] == FAST
    assert result.best.id == result.trials[0].id
    assert (result.best.steps, result.best.samples, result.best.status) == (8, 128, "finished")
    assert [e.number for e in result.best.evaluations] == [1, 2, 3, 4]
    assert [e.step for e in result.best.evaluations] == [2, 4, 6, 8]
    frozen = result.trials[1:]
    assert [(trial.status, trial.steps) for trial in frozen] == [("stopped", 4)] * 2

    # A trial is a training run: its folder holds one, and its value is that of its last checkpoint.
    folder = tmp_path / "sweep" / "trials" / result.best.id
    assert storage.read_json(str(folder / "summary.json"))["steps"] == 8
    assert storage.read_json(str(folder / "run.json"))["status"] == "finished"
    stopped = tmp_path / "sweep" / "trials" / frozen[0].id
    assert not (stopped / "summary.json").exists()
    assert not (tmp_path / "sweep" / ".tune").exists()
    assert storage.read_json(str(tmp_path / "sweep" / "sweep.json")) == result.model_dump()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    started = time.monotonic()
    assert sweep(cfg) == result
    assert time.monotonic() - started < 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_a_killed_driver_goes_on_without_redoing_finished_trials(tmp_path: Path) -> None:
    tree = sweep_tree(tmp_path, scheduler=None)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "cl.cli", "sweep", str(tmp_path / "sweep.yaml"), "--json"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    out = tmp_path / "sweep"

    driver = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while not any(trial.status == "finished" for trial in trial_files(out).values()):
        assert driver.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = driver.children(recursive=True)
    driver.kill()
    driver.wait()
    assert not (out / "sweep.json").exists()

    finished = [name for name, trial in trial_files(out).items() if trial.status == "finished"]
    assert 1 <= len(finished) < 3
    trained = {path: path.stat().st_mtime_ns for name in finished for path in [out / "trials" / name / "metrics.jsonl"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    result = storage.read_json(str(out / "sweep.json"))
    assert [trial["status"] for trial in result["trials"]] == ["finished"] * 3
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    for trial in result["trials"]:
        assert [e["step"] for e in trial["evaluations"]] == [2, 4, 6, 8]
        lines = (out / "trials" / trial["id"] / "metrics.jsonl").read_text().splitlines()
        assert [yaml.safe_load(line)["step"] for line in lines] == list(range(1, 9))
    # Ray's agents look for their parent now and then; by now all that the killed driver had started has ended.
    _, left = psutil.wait_procs(started, timeout=120)
    assert left == []


@pytest.mark.slow
def test_a_trial_that_fails_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    """An infinite weight decay makes the weights, and with them the loss, not a number."""
    space = {"optimizer.weight_decay": {"choice": [0.0, 1e300]}}
    result = sweep(make(tmp_path, space=space, scheduler=None, concurrency=2))
    good, bad = result.trials
    assert (good.status, good.parameters) == ("finished", {"optimizer.weight_decay": 0.0})
    assert bad.status == "failed"
    assert "finite" in (bad.error or "")
    assert result.best == good


def test_mistakes_are_found_before_ray_starts(tmp_path: Path) -> None:
    cfg = make(tmp_path)

    def refused(**fields: Any) -> str:
        with pytest.raises(ClewError) as caught:
            sweep(parse_config(SweepConfig, {**cfg.model_dump(mode="json"), **fields}, "test"))
        return str(caught.value)

    assert "Did you mean 'temperature'" in refused(space={"objective.temprature": {"choice": [0.1]}})
    assert "batch_size" in refused(space={"batch_size": {"choice": [16, "many"]}})
    assert "choose from" in refused(metric="uniformity/nowhere")
    assert "No metric is called 'uniformness'" in refused(metric="uniformness/anchor")
    assert "does not exist" in refused(validation={"val": str(tmp_path / "nowhere")})
    assert "too few for 4 evaluations" in refused(samples=32)
    assert "workers.count is the same" in refused(space={"workers.count": {"choice": [0, 1]}})
    assert not (tmp_path / "sweep").exists()
    with pytest.raises(ConfigError, match="No train config is called 'no-such-config'"):
        sweep(cfg.model_copy(update={"base": "no-such-config"}))
