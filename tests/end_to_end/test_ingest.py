"""Ingest through Ray: the shipped sample with its planted defects, kills and reruns, and every error's sentence."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cl.corpus import open_corpus, sample_id
from cl.errors import DataError
from pipelines.ingest import IngestConfig, ingest
from pipelines.sample import sample_dir
from tests.end_to_end.clew import PATIENCE

PLANTED = json.loads((sample_dir() / "planted.json").read_text())
IMAGE_DEFECTS = [row for row in PLANTED if not row["shard"].startswith("text/")]


def tree(root: Path) -> dict[str, bytes]:
    """What must be the same after every run: fragments, quarantine and manifest."""
    files = [root / "corpus.json", *root.glob("samples/*"), *root.glob("quarantine/*")]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def quarantine(root: Path) -> list[dict[str, str]]:
    return [row for file in sorted(root.glob("quarantine/*.parquet")) for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def train(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped train shards, ingested once."""
    out = tmp_path_factory.mktemp("train")
    result = ingest(IngestConfig(inputs=[str(sample_dir() / "train")], out=str(out)))
    assert (result.shards, result.reused) == (4, 0)
    return out


def test_the_shipped_files_are_those_of_the_build_script() -> None:
    sums = [line.split("  ") for line in (sample_dir() / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in sums} == {
        path.relative_to(sample_dir()).as_posix()
        for pattern in ("*.tar", "*.parquet", "planted.json")
        for path in sample_dir().rglob(pattern)
    }
    for digest, name in sums:
        assert hashlib.sha256((sample_dir() / name).read_bytes()).hexdigest() == digest, name


def test_every_planted_defect_meets_its_fate(train: Path) -> None:
    kept = {row["key"]: row for row in open_corpus(str(train)).read().to_pylist()}
    out = [(row["key"], row["reason"]) for row in quarantine(train)]
    for planted in IMAGE_DEFECTS:
        key = f"{planted['shard'].removesuffix('.tar')}/{planted['key']}"
        fate, _, reason = planted["expected"].partition(":")
        if fate == "quarantine":
            assert (key, reason) in out, planted
        else:
            assert key in kept, planted  # `drop` is for the stages of curation
    assert len(out) == sum(row["expected"].startswith("quarantine") for row in IMAGE_DEFECTS)
    assert {row["stage"] for row in quarantine(train)} == {"ingest"}


def test_counts_are_conserved_and_rows_point_at_their_bytes(train: Path) -> None:
    corpus = open_corpus(str(train))
    rows = corpus.read().to_pylist()
    keys = set()
    for shard in sorted((sample_dir() / "train").glob("*.tar")):
        with open(shard, "rb") as raw, contextlib.suppress(tarfile.ReadError):  # the truncated one, at its end
            for member in tarfile.open(fileobj=raw):  # noqa: SIM115
                keys.add(f"{shard.stem}/{member.name.split('.')[0]}")
    assert keys == {row["key"] for row in rows} | {row["key"] for row in quarantine(train)}
    assert len({row["id"] for row in rows}) == corpus.samples == len(rows)
    for row in rows[::97]:
        with open(row["shard"], "rb") as file:
            file.seek(row["offset"])
            image = Image.open(io.BytesIO(file.read(row["length"])))
        assert (image.format or "").lower() == row["format"]
        assert image.size == (row["width"], row["height"])
        assert row["id"] == sample_id(row["source"], row["key"])
        assert json.loads(row["meta"])["label"]
    assert {row["source"] for row in rows} == {"clipart", "emoji-google", "planted-truncated"}
    by_key = {row["key"].split("/")[1]: row for row in rows}
    copies = [row for row in IMAGE_DEFECTS if row["defect"].startswith("same bytes")]
    assert copies
    assert all(by_key[row["key"]]["content"] == by_key[row["of"]]["content"] for row in copies)


def test_a_second_run_does_nothing_and_a_changed_one_only_what_changed(
    ray_session: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs, out = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    for name in ("clipart-00000.tar", "planted-truncated-00000.tar"):
        (inputs / name).write_bytes((sample_dir() / "train" / name).read_bytes())
    config = IngestConfig(inputs=[str(inputs)], out=str(out))
    first = ingest(config)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}
    before = tree(out)
    again = ingest(config)
    assert (first.reused, again.reused, again.samples) == (0, 2, first.samples)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")} == times
    assert tree(out) == before
    whole = sample_dir() / "heldout/clipart/clipart-00000.tar"
    (inputs / "planted-truncated-00000.tar").write_bytes(whole.read_bytes())
    changed = ingest(config)
    assert (changed.reused, changed.shards) == (1, 2)
    assert changed.sources["planted-truncated"] == 253
    assert not (out / "quarantine/00001.parquet").exists()  # the old shard's quarantine is gone with it
    (inputs / "planted-truncated-00000.tar").unlink()
    assert ingest(config).reused == 1
    assert [path.name for path in (out / "samples").iterdir()] == ["00000.parquet"]
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    assert "Traceback" not in capfd.readouterr().err


def test_text_pairs(ray_session: None, tmp_path: Path) -> None:
    result = ingest(
        IngestConfig(
            inputs=[str(sample_dir() / "text/train.parquet")],
            out=str(tmp_path),
            source="wordnet",
            columns={"anchor": "query", "positive": "positive", "key": "synset"},
        )
    )
    planted = {row["key"]: row["expected"] for row in PLANTED if row["shard"].startswith("text/")}
    assert result.reasons == {"empty_text": 2, "missing_text": 2}
    corpus = open_corpus(str(tmp_path))
    assert corpus.kind == "text-text"
    keys = {row["key"] for row in corpus.read().to_pylist()}
    assert {f"train/{key}" in keys for key, fate in planted.items() if not fate.startswith("quarantine")} == {True}
    assert {row["key"] for row in quarantine(tmp_path)} == {
        f"train/{key}" for key, fate in planted.items() if fate.startswith("quarantine")
    }
    contents = [row["content"] for row in corpus.read().to_pylist()]
    assert len(contents) - len(set(contents)) == 3  # two exact duplicates and one that differs by case


SCRIPT = """
import sys
from pipelines.ingest import IngestConfig, ingest
ingest(IngestConfig(inputs=[sys.argv[1]], out=sys.argv[2], cpus=1))
"""


@pytest.mark.slow
def test_killed_in_mid_run_and_started_again_gives_the_same_bytes(ray_session: None, tmp_path: Path) -> None:
    inputs = tmp_path / "in"
    inputs.mkdir()
    data = (sample_dir() / "train/clipart-00000.tar").read_bytes()
    for number in range(24):
        (inputs / f"copy-{number:05d}.tar").write_bytes(data)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(inputs), str(killed)], env=environment, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE
    while len(list(killed.glob(".ingest/*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(killed.glob(".ingest/*.json")))
    assert 3 <= done < 24
    assert not (killed / "corpus.json").exists()
    with pytest.raises(DataError, match="is not a finished corpus"):
        open_corpus(str(killed))
    assert json.loads((killed / "run.json").read_text())["status"] == "running"
    (killed / "samples/.tmp-left-behind").write_bytes(b"half a file")
    # Ray's workers may outlive the driver for a moment and finish their shards: more may be done than was seen.
    again = ingest(IngestConfig(inputs=[str(inputs)], out=str(killed)))
    assert done <= again.reused < 24
    ingest(IngestConfig(inputs=[str(inputs)], out=str(whole)))
    assert tree(killed) == tree(whole)


def sentence(**config: Any) -> str:
    with pytest.raises(DataError) as error:
        ingest(IngestConfig(**config))
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", ")"))
    return text


def test_errors_before_ray_starts(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = str(tmp_path / "out")
    assert "nowhere.tar does not exist" in sentence(inputs=[f"{tmp_path}/nowhere.tar"], out=out)
    assert "is a folder without any" in sentence(inputs=[f"{tmp_path}/empty"], out=out)
    pq.write_table(pa.table({"a": ["x"], "b": [1]}), tmp_path / "t.parquet")
    assert "has no column 'anchor'; it has a, b" in sentence(inputs=[f"{tmp_path}/t.parquet"], out=out)
    wrong = {"anchor": "a", "positive": "b"}
    assert "column 'b' is int64, expected text" in sentence(inputs=[f"{tmp_path}/t.parquet"], out=out, columns=wrong)
    (tmp_path / "l.jsonl").write_text('{"q": "x"}\n')
    assert "has no column 'anchor'; it has q" in sentence(inputs=[f"{tmp_path}/l.jsonl"], out=out)
    assert not (tmp_path / "out").exists()


def test_errors_of_whole_corpora(ray_session: None, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "no-captions-0.tar", "w") as tar:
        for number in range(3):
            header = tarfile.TarInfo(f"{number}.jpg")
            tar.addfile(header, io.BytesIO(b""))
    text = sentence(inputs=[f"{tmp_path}/no-captions-0.tar"], out=str(tmp_path / "a"))
    assert "No valid sample in 1 shard" in text
    assert "3 were quarantined (3 not_an_image)" in text
    assert not (tmp_path / "a/corpus.json").exists()
    assert json.loads((tmp_path / "a/run.json").read_text())["status"] == "failed"
    with tarfile.open(tmp_path / "empty-0.tar", "w"):
        pass
    assert "they are empty" in sentence(inputs=[f"{tmp_path}/empty-0.tar"], out=str(tmp_path / "b"))


def test_a_column_missing_in_a_later_table_stops_the_run_with_its_name(ray_session: None, tmp_path: Path) -> None:
    pq.write_table(pa.table({"anchor": ["a"], "positive": ["b"]}), tmp_path / "t-0.parquet")
    pq.write_table(pa.table({"anchor": ["a"]}), tmp_path / "t-1.parquet")
    text = sentence(inputs=[str(tmp_path)], out=str(tmp_path / "out"))
    assert "t-1.parquet has no column 'positive'" in text


def test_an_unreadable_table_costs_itself_only(ray_session: None, tmp_path: Path) -> None:
    pq.write_table(pa.table({"anchor": ["a"], "positive": ["b"]}), tmp_path / "t-0.parquet")
    (tmp_path / "t-1.parquet").write_bytes(b"PAR1 but no more")
    result = ingest(IngestConfig(inputs=[str(tmp_path)], out=str(tmp_path / "out")))
    assert (result.samples, result.reasons) == (1, {"unreadable_shard": 1})


def test_output_that_cannot_be_written(ray_session: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written"):
        ingest(IngestConfig(inputs=[str(sample_dir() / "heldout/clipart")], out=str(tmp_path / "file/corpus")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/corpus.json").write_text("{}")
    assert "did not make" in sentence(inputs=[str(sample_dir() / "heldout/clipart")], out=str(tmp_path / "other"))
