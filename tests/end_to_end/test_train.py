"""`clew train` through Ray Train and through torchrun, as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cl.config import parse_config
from cl.training.config import TrainConfig
from cl.training.metrics import read_metrics
from cl.training.run import train
from tests.end_to_end.clew import PATIENCE, clew, environment, sentence
from tests.training_corpus import tiny_run, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "squares", samples=82)


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl")]


@pytest.mark.slow
def test_ray_train_and_torchrun_equal_one_process(corpus: str, tmp_path: Path) -> None:
    """Two Ray Train workers, two torchrun workers and a process alone: the same 20 losses to 1e-9 in float64."""
    train(parse_config(TrainConfig, tiny_run(corpus, tmp_path / "alone"), "test"))
    alone = losses(tmp_path / "alone")
    assert len(alone) == 20

    (tmp_path / "train.yaml").write_text(yaml.safe_dump(tiny_run(corpus, tmp_path / "ray", workers={"count": 2})))
    done = clew("train", "train.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["steps"], result["workers"]) == (20, 2)
    assert losses(tmp_path / "ray") == pytest.approx(alone, rel=1e-9, abs=1e-9)
    assert not (tmp_path / "ray" / ".ray").exists()

    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cl.cli", "train", "train.yaml"]
    started = subprocess.run(
        [sys.executable, *words, f"out={tmp_path / 'torchrun'}"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert started.returncode == 0, started.stderr
    assert losses(tmp_path / "torchrun") == pytest.approx(alone, rel=1e-9, abs=1e-9)


@pytest.mark.slow
def test_what_a_worker_finds_wrong_reaches_the_user(corpus: str, tmp_path: Path) -> None:
    """A learning rate that ends in NaN: exit code 2, one sentence with step and samples, no second try."""
    wild = tiny_run(corpus, tmp_path / "run", workers={"count": 2}, precision="fp32", clip_norm=None)
    wild["optimizer"], wild["schedule"] = {"lr": 1e30}, {"kind": "constant"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(wild))
    done = clew("train", "train.yaml", "--json", cwd=tmp_path)
    words = sentence(done)
    assert "at step 2" in words
    assert "worker 0: " in words
    assert "worker 1: " in words
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["corpus=/nowhere"], "Corpus /nowhere does not exist."),
        (["optimizer.lrr=1"], "Did you mean 'lr'?"),
        (["epochs=2"], "exactly one of steps, samples and epochs"),
        (["workers.count=64"], "batch_size (16) must be at least workers.count (64)"),
        (["model.views={anchor: text, image: image}"], "view"),
    ],
)
def test_refused_before_ray_starts(corpus: str, tmp_path: Path, words: list[str], expected: str) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(tiny_run(corpus, tmp_path / "run", workers={"count": 2})))
    assert expected in sentence(clew("train", "train.yaml", *words, cwd=tmp_path))
    assert not (tmp_path / "run").exists()
