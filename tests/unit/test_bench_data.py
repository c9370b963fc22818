"""`clew bench data`: what a training config reads, timed without a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from cl.cli import main
from cl.config import parse_config
from cl.errors import ConfigError
from cl.training.config import TrainConfig
from cl.training.data import TrainingData
from cl.training.throughput import measure_data
from tests.unit.corpora import image_corpus


def config(corpus: Path) -> TrainConfig:
    fields = {"out": "unused", "corpus": str(corpus), "model": "tiny-clip", "batch_size": 8, "epochs": 1}
    return parse_config(TrainConfig, fields, "test")


def test_each_number_of_threads_reads_other_batches_and_counts_what_arrived(tmp_path: Path) -> None:
    image_corpus(tmp_path / "corpus", broken=(3,))
    cfg = config(tmp_path / "corpus")
    rows = measure_data(cfg, [1, 2], steps=6)
    assert [row.threads for row in rows] == [1, 2]
    for row in rows:
        assert row.samples_per_second == pytest.approx(8 / (row.batch_ms / 1000), rel=0.01)
        assert row.first_batch_seconds > 0
    loader = TrainingData.of(cfg).loader(0, 1, done=0, steps=14)
    ids = [tuple(each) for batch in loader for each in batch.ids.tolist()]
    assert len(set(ids)) == 14 * 8, "the batches that both numbers of threads read are different ones"
    assert sum(row.undecodable for row in rows) == 1


def test_tokens_are_those_that_are_no_padding(tmp_path: Path) -> None:
    image_corpus(tmp_path / "corpus")
    cfg = config(tmp_path / "corpus")
    (row,) = measure_data(cfg, [1], steps=3)
    data = TrainingData.of(cfg)
    _, *timed = data.loader(0, 1, steps=4)
    pad = data.inputs.text("text").tokenizer.pad_id
    shown = [batch.views["text"] for batch in timed]
    real = sum(
        len([token for token in text.flatten().tolist() if token != pad]) for text in shown if torch.is_tensor(text)
    )
    assert row.tokens_per_second is not None
    assert row.tokens_per_second / row.samples_per_second == pytest.approx(real / 24, rel=0.01)


def test_a_worker_of_several_reads_its_part(tmp_path: Path) -> None:
    image_corpus(tmp_path / "corpus")
    (row,) = measure_data(config(tmp_path / "corpus"), [1], steps=3, workers=4)
    assert row.samples_per_second == pytest.approx(2 / (row.batch_ms / 1000), rel=0.01)


def test_the_command_prints_rows_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    fields = {"corpus": "corpus", "model": "tiny-clip", "batch_size": 8, "epochs": 1}
    Path("run.yaml").write_text(yaml.safe_dump(fields))
    main(["bench", "data", "run.yaml", "batch_size=4", "--threads", "1", "--threads", "2", "--steps", "2", "--json"])
    assert [row["threads"] for row in json.loads(capsys.readouterr().out)] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "run.yaml"]


@pytest.mark.parametrize(
    ("threads", "steps", "workers"), [([], 1, 1), ([0], 1, 1), ([1], 0, 1), ([1], 1, 0), ([1], 1, 9)], ids=str
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, threads: list[int], steps: int, workers: int) -> None:
    image_corpus(tmp_path / "corpus", fragments=1, rows=8)
    with pytest.raises(ConfigError, match="clew bench data takes"):
        measure_data(config(tmp_path / "corpus"), threads, steps, workers)
