"""Mined negatives and further positives: from a column of the corpus to the objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cl.batches.batch import Batch
from cl.batches.extra import ExtraConfig, open_extra
from cl.batches.loader import Loader
from cl.batches.plan import BatchPlan
from cl.config import parse_config
from cl.corpus import Corpus
from cl.encoders import ModelConfig, build_inputs
from cl.errors import ClewError
from cl.pairs import Pairs
from cl.training.callbacks import CALLBACKS, Callback, Progress
from cl.training.config import TrainConfig
from cl.training.metrics import read_metrics
from cl.training.run import train
from tests.training_corpus import TINY_MODEL, tiny_run
from tests.unit.corpora import text_corpus

MODEL = {
    "embed_dim": 16,
    "towers": {"text": TINY_MODEL["towers"]["text"]},
    "views": {"anchor": "text", "positive": "text"},
}
ROWS = 48


def negatives_of(row: int) -> list[str] | None:
    """None; a blank, the positive of the next sample and another; or up to five others."""
    if row % 4 == 0:
        return None
    if row % 4 == 1:
        return [" ", f"answer {row + 1}, which is {'long ' * ((row + 1) % 7)}", f"nor {row}"]
    return [f"no {row} {n}" for n in range(row % 4 + 2)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("corpus")
    return text_corpus(root, ROWS, row_group=8, negatives=[negatives_of(row) for row in range(ROWS)])


def batches(corpus: Corpus, rank: int = 0, world: int = 1, steps: int = 6) -> list[Batch]:
    inputs = build_inputs(parse_config(ModelConfig, MODEL, "test"), train=True)
    config = parse_config(ExtraConfig, {"column": "negatives", "view": "positive", "most": 3}, "test")
    extra = open_extra({"negatives": config}, [corpus], inputs)
    return list(Loader(BatchPlan([corpus], 3, 18), rank, world, inputs, steps=steps, extra=extra))


def by_sample(made: list[Batch]) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    """(epoch, id) -> its negatives, as words without padding."""
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for batch in made:
        further = batch.extra["negatives"]
        assert isinstance(further.inputs, torch.Tensor)
        for row in range(len(batch)):
            mine = further.inputs[further.owner == row]
            words = {tuple(ids[: int(ids.argmax()) + 1].tolist()) for ids in mine}
            if batch.weight[row]:
                found[batch.epoch, *batch.ids[row].tolist()] = words
            else:
                assert not words
    return found


def test_every_sample_has_its_own_whatever_the_number_of_workers(corpus: Corpus) -> None:
    alone = by_sample(batches(corpus))
    spread = by_sample([batch for rank in range(3) for batch in batches(corpus, rank, 3)])
    assert alone == spread
    assert len(alone) == 2 * ROWS
    first = {key[1:]: words for key, words in alone.items() if key[0] == 0}
    second = {key[1:]: words for key, words in alone.items() if key[0] == 1}
    counts = sorted(len(words) for words in first.values())
    assert counts == sorted(min(len([t for t in negatives_of(row) or () if t.strip()]), 3) for row in range(ROWS))
    few, many = [k for k in first if len(first[k]) < 3], [k for k in first if len(first[k]) == 3]
    assert all(first[key] == second[key] for key in few)
    assert any(first[key] != second[key] for key in many)  # others are drawn


SEEN: list[Pairs] = []


@CALLBACKS.register("see_negatives", "test: keep what the objective is given")
class SeeNegatives(Callback):
    def on_start(self, progress: Progress) -> None:
        SEEN.clear()
        progress.objective.register_forward_pre_hook(lambda module, inputs: SEEN.append(inputs[0]))


def config(corpus: Corpus, out: Path, **fields: Any) -> TrainConfig:
    objective = {"name": "mined-negatives", "temperature": 0.1, "learn_temperature": False}
    extra = {"negatives": {"column": "negatives", "view": "positive"}}
    run = {"model": MODEL, "objective": objective, "extra": extra, "batch_size": 18, "steps": 9, **fields}
    return parse_config(TrainConfig, tiny_run(corpus.root, out, **run), "test")


def test_the_objective_learns_from_them(corpus: Corpus, tmp_path: Path) -> None:
    """Against the formula on the whole batch; at once and by gradient caching."""
    curves, met = [], 0
    scale = torch.tensor(10.0).log().double().exp()  # kept as a logarithm in float32
    for run, micro_batch in (("whole", None), ("cached", 5)):
        train(config(corpus, tmp_path / run, micro_batch=micro_batch, callbacks=[{"name": "see_negatives"}]))
        records = read_metrics(tmp_path / run / "metrics.jsonl")
        curves.append([record["loss"] for record in records])
        for step in (0, 4, 8):  # the last of an epoch is padded
            pairs = SEEN[step]
            further = pairs.extra["negatives"]
            assert further.content is not None
            assert pairs.content is not None
            alive = pairs.weights() > 0
            own = scale * pairs.views["anchor"] @ pairs.views["positive"].T
            others = own.masked_fill(~alive[None], -torch.inf)
            mined = scale * pairs.views["anchor"] @ further.embeddings.T
            same = pairs.content[:, 1:] == further.content[:, 1]
            losses = torch.cat([others, mined.masked_fill(same, -torch.inf)], 1).logsumexp(1) - own.diagonal()
            assert records[step]["loss"] == pytest.approx(losses[alive].mean().item(), rel=1e-9)
            met += int(same[alive].sum())
    assert met  # a negative that is another sample's positive
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": {}}, "names 'negatives', but the further texts under extra are: none"),
        (
            {"extra": {"negatives": {"column": "negatives", "view": "answer"}}},
            "the views that give embeddings are anchor",
        ),
        ({"extra": {"negatives": {"column": "hard", "view": "positive"}}}, "names the column 'hard'"),
        ({"extra": {"negatives": {"column": "anchor", "view": "positive"}}}, "expected lists of texts"),
    ],
)
def test_what_cannot_be_read_is_refused(corpus: Corpus, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ClewError, match=words):
        train(config(corpus, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()
