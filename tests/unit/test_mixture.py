"""Composed batches: shares, homogeneous steps, and what must hold of any plan."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cl import storage
from cl.batches.mixture import MixedPlan, MixtureConfig
from cl.batches.steps import StepSamples
from cl.config import parse_config
from cl.corpus import Corpus, Fragment, open_corpus, sample_schema
from cl.errors import ConfigError
from cl.training.config import TrainConfig
from cl.training.metrics import read_metrics
from cl.training.run import train
from tests.training_corpus import tiny_run
from tests.unit.corpora import described_corpus
from tests.unit.test_extra import MODEL

SIZES = {"large": 160, "middle": 40, "small": 10}
BATCH = 12


def corpora() -> list[Corpus]:
    return [
        described_corpus([(5, lane % 4) for lane in range(rows // 5)]).model_copy(update={"root": name})
        for name, rows in SIZES.items()
    ]


def plan(batch: int = BATCH, seed: int = 0, **fields: Any) -> MixedPlan:
    return MixedPlan(corpora(), seed, batch, parse_config(MixtureConfig, fields, "test"))


def steps(made: MixedPlan, count: int) -> list[StepSamples]:
    return [made.step(*made.at(number)) for number in range(count)]


def parts_of(made: MixedPlan, samples: StepSamples) -> list[str]:
    return [made.corpora[made.chunk(int(chunk)).corpus].root for chunk in samples.chunk]


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_parts_have_their_shares_and_are_seen_as_a_whole_before_they_come_again(
    exponent: float, homogeneous: bool
) -> None:
    made = plan(exponent=exponent, weights={"small": 3}, homogeneous=homogeneous)
    wanted = {name: (3 if name == "small" else 1) * rows**exponent for name, rows in SIZES.items()}
    seen: dict[str, list[tuple[int, int]]] = {name: [] for name in SIZES}
    for number, samples in enumerate(steps(made, 60), 1):
        assert len(samples) == BATCH  # never a short one
        named = parts_of(made, samples)
        assert not homogeneous or len(set(named)) == 1
        for name, *place in zip(named, samples.chunk.tolist(), samples.row.tolist(), strict=True):
            seen[name].append((place[0], place[1]))
        for name, weight in wanted.items():  # at every step, to within one sample or one step a part
            share = number * BATCH * weight / sum(wanted.values())
            assert abs(len(seen[name]) - share) <= (2 * BATCH if homogeneous else 2)
    for name, rows in SIZES.items():
        for start in range(0, len(seen[name]) - rows + 1, rows):
            assert len(set(seen[name][start : start + rows])) == rows
    assert seen["small"][:10] != seen["small"][10:20]  # in another order
    turns = [turn for samples in steps(made, 60) for turn in samples.turn.tolist()]
    assert max(turns) == max(-(-len(found) // SIZES[name]) for name, found in seen.items()) - 1


def test_any_step_is_found_without_those_before_it_and_for_any_number_of_workers() -> None:
    made = plan(exponent=0.5)
    for number, samples in enumerate(steps(made, 40)):
        again = plan(exponent=0.5).step(*made.at(number))
        assert np.array_equal(samples.chunk, again.chunk)
        assert np.array_equal(samples.row, again.row)
        for world in (1, 2, 5):
            parts = [made.part(samples, rank, world) for rank in range(world)]
            assert np.array_equal(np.concatenate([part.row for part in parts]), samples.row)
    other = plan(exponent=0.5, seed=1).step(0, 0)
    assert not np.array_equal(other.row, made.step(0, 0).row)


def test_what_changes_the_order_changes_the_digest() -> None:
    digests = {
        each.digest for each in (plan(), plan(exponent=0.5), plan(homogeneous=True), plan(seed=1), plan(batch=13))
    }
    assert len(digests) == 5
    assert plan(exponent=0.5).digest in digests


def sourced(root: Path, sources: list[str], row_group: int) -> str:
    """A corpus of text pairs with a source for each row."""
    names = [field.name for field in sample_schema("text-text")]
    rows: list[dict[str, Any]] = [
        {
            **{name: f"{name} {row}" for name in names},
            "id": f"{row:032x}",
            "content": f"{row:032x}",
            "source": source,
            "meta": None,
            "negatives": None,
        }
        for row, source in enumerate(sources)
    ]
    storage.write_table(
        str(root / "samples/0.parquet"), pa.Table.from_pylist(rows, sample_schema("text-text")), row_group
    )
    groups = [min(row_group, len(rows) - start) for start in range(0, len(rows), row_group)]
    fragment = Fragment(path="samples/0.parquet", samples=len(rows), shard="samples/0.parquet", row_groups=groups)
    Corpus(kind="text-text", samples=len(rows), fragments=[fragment]).write(str(root))
    return str(root)


def test_a_run_on_homogeneous_batches_of_a_column(tmp_path: Path) -> None:
    corpus = sourced(tmp_path / "corpus", ["wiki"] * 24 + ["news"] * 8, 8)
    made = MixedPlan([open_corpus(corpus)], 0, 8, MixtureConfig(by="source", homogeneous=True))
    turns = Counter(tuple(sorted({int(chunk) for chunk in samples.chunk})) for samples in steps(made, 8))
    assert turns[(3,)] == 2  # a quarter of the samples are news
    run = {"model": MODEL, "batch_size": 8, "steps": 8, "labels": {"source": "source"}}
    run |= {"mixture": {"by": "source", "homogeneous": True, "exponent": 0.5}, "objective": {"name": "infonce"}}
    train(parse_config(TrainConfig, tiny_run(corpus, tmp_path / "run", **run), "test"))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["samples"] for record in records] == [8 * step for step in range(1, 9)]
    assert all(after["epoch"] >= before["epoch"] for before, after in pairwise(records))


def test_a_mixture_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights names 'huge', but the parts are large, middle, small"):
        plan(weights={"huge": 2})
    with pytest.raises(ConfigError, match="weight of 'small' must be a positive number"):
        plan(weights={"small": 0})
    mixed = open_corpus(sourced(tmp_path / "mixed", ["wiki", "news"] * 8, 8))
    with pytest.raises(ConfigError, match=r"row group 0 of .* has no single value of it"):
        MixedPlan([mixed], 0, 8, MixtureConfig(by="source"))
    with pytest.raises(ConfigError, match="the column 'language'"):
        MixedPlan([mixed], 0, 8, MixtureConfig(by="language"))
