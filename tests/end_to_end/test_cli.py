"""What a user can get wrong: one sentence, exit code 2, no traceback, and nothing started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.end_to_end.clew import PATIENCE, ROOT, clew, environment, sentence
from tests.end_to_end.small_corpora import write_text_corpus

# A Ray that cannot be reached: what starts or attaches to Ray fails with this address and not with its sentence.
NO_RAY: dict[str, Any] = {"RAY_ADDRESS": "127.0.0.1:1"}
TEXT_MODEL = {
    "embed_dim": 8,
    "towers": {
        "text": {
            "family": "open_clip",
            "part": "text",
            "config": {"vocab_size": 600, "context_length": 16, "width": 16, "heads": 2, "layers": 1},
        }
    },
    "views": {"anchor": "text", "positive": "text"},
}


def train_config(folder: Path, **fields: object) -> str:
    """A small training config as a file; returns its name."""
    config = {"out": "model", "corpus": "pairs", "model": TEXT_MODEL, "batch_size": 8, "steps": 4, "precision": "fp32"}
    (folder / "train.yaml").write_text(yaml.safe_dump({**config, **fields}))
    return "train.yaml"


def test_refused_configs_name_field_value_and_what_is_accepted(tmp_path: Path) -> None:
    name = train_config(tmp_path)
    for word, parts in [
        ("batchsize=4", ["'batchsize'", "4", "Did you mean 'batch_size'?"]),
        ("optimizer.lrr=1e-3", ["'optimizer.lrr'", "0.001", "Did you mean 'lr'?"]),
        ("batch_size=many", ["'batch_size'", "'many'", "integer"]),
        ("precision=fp8", ["'precision'", "'fp8'", "'bf16'"]),
        ("objective.name=infonec", ["infonec", "Did you mean 'infonce'?"]),
        ("model.towers.text.family=open_clap", ["open_clap", "Did you mean 'open_clip'?"]),
    ]:
        said = sentence(clew("train", name, word, cwd=tmp_path, **NO_RAY))
        assert all(part in said for part in parts), said
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_wrong_input_is_one_sentence(tmp_path: Path) -> None:
    name = train_config(tmp_path)
    assert "pairs does not exist" in sentence(clew("train", name, cwd=tmp_path, **NO_RAY))
    assert "nothere.tar does not exist" in sentence(clew("ingest", "nothere.tar", "--out", "x", cwd=tmp_path, **NO_RAY))
    (tmp_path / "empty").mkdir()
    assert "empty" in sentence(clew("ingest", "empty", "--out", "x", cwd=tmp_path, **NO_RAY))
    assert "empty" in sentence(clew("train", name, "corpus=empty", cwd=tmp_path, **NO_RAY))
    write_text_corpus(tmp_path / "whole", [("question", "answer"), ("another", "one")])
    words = ["checkpoint=nothere", "corpora={all: whole}", "out=eval"]
    assert "nothere" in sentence(clew("eval", *words, cwd=tmp_path, **NO_RAY))
    assert "nothere" in sentence(clew("report", "nothere", "--out", "page.html", cwd=tmp_path, **NO_RAY))
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"]}), tmp_path / "pairs.parquet")
    said = sentence(clew("ingest", "pairs.parquet", "--out", "x", cwd=tmp_path, CLEW_QUIET="1", **NO_RAY))
    assert "'anchor'" in said
    assert "question" in said


@pytest.mark.slow
def test_a_corpus_without_a_valid_sample_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"anchor": "", "positive": ""}\nnot json\n')
    said = sentence(clew("ingest", "pairs.jsonl", "--out", "pairs", cwd=tmp_path, CLEW_QUIET="1"))
    assert "pairs" in said
    said = sentence(clew("train", train_config(tmp_path), cwd=tmp_path, **NO_RAY))
    assert "pairs" in said


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence(full_disk: Path, tmp_path: Path) -> None:
    write_text_corpus(tmp_path / "pairs", [(f"question {n}", f"answer {n}") for n in range(32)])
    name = train_config(tmp_path, out=str(full_disk / "model"), workers={"count": 0})
    said = sentence(clew("train", name, cwd=tmp_path, CLEW_QUIET="1"))
    assert "space" in said
    assert str(full_disk) in said


def test_print_config_starts_nothing(tmp_path: Path) -> None:
    name = train_config(tmp_path)
    done = clew("train", name, "optimizer.lr=1e-3", "--print-config", cwd=tmp_path, **NO_RAY)
    assert (done.returncode, done.stderr) == (0, "")
    config = yaml.safe_load(done.stdout)
    assert (config["optimizer"]["lr"], config["batch_size"], config["clip_norm"]) == (1e-3, 8, 1.0)
    (tmp_path / "again.yaml").write_text(done.stdout)
    again = clew("train", "again.yaml", "--print-config", cwd=tmp_path, **NO_RAY)
    assert again.stdout == done.stdout
    as_json = clew("train", name, "optimizer.lr=1e-3", "--print-config", "--json", cwd=tmp_path, **NO_RAY)
    assert json.loads(as_json.stdout) == config
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_json_alone_is_on_stdout(tmp_path: Path) -> None:
    write_text_corpus(tmp_path / "pairs", [(f"question {n}", f"answer {n}") for n in range(32)])
    done = clew("train", train_config(tmp_path, workers={"count": 1}), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 4
    assert "\x1b" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_says_how_to_resume(tmp_path: Path) -> None:
    write_text_corpus(tmp_path / "pairs", [(f"question {n}", f"answer {n}") for n in range(64)])
    name = train_config(tmp_path, steps=1_000_000, workers={"count": 2}, checkpoint={"every_steps": 5}, log_every=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "cl.cli", "train", name],
        cwd=tmp_path,
        env=environment(CLEW_TEST_MARK=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "model" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 20):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].endswith(f"clew train {name} --resume")
    assert "Traceback" not in err
    assert marked(str(tmp_path)) == []
    assert json.loads((tmp_path / "model" / "run.json").read_text())["status"] == "interrupted"


def marked(mark: str) -> list[str]:
    """Command lines of the processes whose environment carries a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"CLEW_TEST_MARK={mark}".encode() in (folder / "environ").read_bytes() and folder.name != str(
                os.getpid()
            ):
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has ended, or is not ours
    return found


def test_the_makefile_knows_its_targets() -> None:
    for target in ("demo", "test", "setup", "lint", "chaos", "bench", "clean"):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
