"""Embeddings that `clew embed` wrote are a teacher's views: of the right sample, whatever the step, worker or chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cl.batches.reader import hex_words
from cl.config import parse_config
from cl.corpus import open_corpus
from cl.encoders import ModelConfig, build_model, save_model
from cl.errors import ConfigError, DataError
from cl.pairs import Pairs
from cl.training.callbacks import CALLBACKS, Callback, Progress
from cl.training.config import TrainConfig
from cl.training.metrics import read_metrics
from cl.training.run import train
from pipelines.embed import _EmbedFragments
from pipelines.plan import build_plan
from pipelines.stages.embedding import Embedding
from tests.training_corpus import TINY_MODEL, tiny_run, write_corpus

SEEN: list[Pairs] = []
OBJECTIVE = {
    "name": "sum",
    "terms": {
        "clip": {"objective": {"name": "infonce", "views": ["image", "text"]}},
        "old": {"objective": {"name": "infonce", "views": ["image", "image_old"]}},
    },
}


@CALLBACKS.register("see_stored", "test: keep what the objective is given")
class SeeStored(Callback):
    def on_start(self, progress: Progress) -> None:
        SEEN.clear()
        progress.objective.register_forward_pre_hook(lambda module, inputs: SEEN.append(inputs[0]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and its embeddings by a model of 12 dimensions."""
    root = tmp_path_factory.mktemp("stored")
    corpus = open_corpus(write_corpus(root / "corpus", samples=40))
    cfg = parse_config(ModelConfig, TINY_MODEL | {"embed_dim": 12}, "test")
    save_model(build_model(cfg, seed=5), cfg, root / "large")
    plan = build_plan(corpus, [Embedding(model=str(root / "large"))], str(root / "embeddings"), seed=0)
    embed = _EmbedFragments(plan, str(root / "embeddings"))
    for number in range(len(corpus.fragments)):
        embed(number)
    return root


def config(place: Path, out: Path, **fields: Any) -> TrainConfig:
    teacher = {"old": {"kind": "stored", "embeddings": str(place / "embeddings")}}
    run = {"teachers": teacher, "objective": OBJECTIVE, "steps": 6, "callbacks": [{"name": "see_stored"}], **fields}
    return parse_config(TrainConfig, tiny_run(str(place / "corpus"), out, **run), "test")


def test_every_sample_sees_its_own_embedding(place: Path, tmp_path: Path) -> None:
    train(config(place, tmp_path / "run", model=TINY_MODEL | {"embed_dim": 12}))
    stored = {}
    for file in sorted((place / "embeddings").glob("*.parquet")):
        table = pq.read_table(file)
        for ids, image in zip(hex_words(table["id"]), table["image_embedding"].to_pylist(), strict=True):
            stored[tuple(ids.tolist())] = np.array(image)
    assert len(stored) == 40
    seen = set()
    for pairs in SEEN:
        assert pairs.ids is not None
        views = pairs.views["image_old"]
        for ids, alive, view in zip(pairs.ids.tolist(), pairs.weights().tolist(), views, strict=True):
            if alive:
                seen.add(tuple(ids))
                assert np.allclose(view.numpy(), stored[tuple(ids)], atol=1e-3)
                assert float(view.norm()) == pytest.approx(1, abs=1e-6)
    assert seen == stored.keys()  # two epochs
    assert not any(pairs.views["image_old"].requires_grad for pairs in SEEN)


def test_gradient_caching_sees_them_too(place: Path, tmp_path: Path) -> None:
    model = TINY_MODEL | {"embed_dim": 12}
    curves = []
    for run, micro_batch in (("whole", None), ("cached", 5)):
        train(config(place, tmp_path / run, model=model, micro_batch=micro_batch))
        curves.append([r["loss"] for r in read_metrics(tmp_path / run / "metrics.jsonl")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert torch.isfinite(torch.tensor(curves)).all()


def test_what_does_not_fit_is_one_sentence(place: Path, tmp_path: Path) -> None:
    def run(name: str, **teacher: Any) -> None:
        train(config(place, tmp_path / name, teachers={"old": {"kind": "stored", **teacher}}))

    with pytest.raises(ConfigError, match=r"nowhere has no 00000.parquet: `clew embed` all of"):
        run("gone", embeddings=str(place / "nowhere"))
    with pytest.raises(ConfigError, match="names 2 folders, but the run has 1 corpora"):
        run("two", embeddings=[str(place / "embeddings")] * 2)
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in (place / "embeddings").glob("*.parquet"):
        pq.write_table(pq.read_table(file).slice(1), cut / file.name)
    with pytest.raises(DataError, match=r"has no embedding of the sample .*: embed this corpus again"):
        run("cut", embeddings=str(cut))
