"""Arrangements: what they promise of every step, and what must hold of any plan."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl.batches.arranged import make_plan
from cl.batches.arrangements import ARRANGEMENTS, ArrangeConfig, build_arrangement
from cl.batches.loader import Loader
from cl.batches.mixture import MixtureConfig
from cl.batches.steps import Plan, StepSamples
from cl.config import parse_config
from cl.corpus import Corpus, normal_text
from cl.encoders import ModelConfig, build_inputs
from cl.errors import ConfigError
from cl.training.config import TrainConfig
from cl.training.metrics import read_metrics
from cl.training.run import train
from pipelines.inspect import inspect_batch
from tests.training_corpus import tiny_run
from tests.unit.corpora import text_corpus
from tests.unit.test_extra import MODEL

ROWS, BATCH, POOL = 150, 16, 4
LANGUAGES = ["en", "de", "fr"]


def arrangement(name: str, **fields: Any) -> ArrangeConfig:
    return parse_config(ArrangeConfig, {"name": name, **fields}, "test")


def deal(name: str, keys: np.ndarray, sizes: list[int], seed: int = 0, **fields: Any) -> np.ndarray:
    config = arrangement(name, **({"by": "x"} | fields))
    home = np.repeat(np.arange(len(sizes)), sizes)
    return build_arrangement(config).deal(keys, home, np.array(sizes), seed)


@st.composite
def pools(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    """Keys [n, 1] of few values, and the sizes of the steps, of which the last may be short."""
    steps, batch = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    sizes = [batch] * (steps - 1) + [draw(st.integers(1, batch))]
    values = draw(st.lists(st.integers(-2, 5), min_size=sum(sizes), max_size=sum(sizes)))
    return np.array(values, dtype=np.int64)[:, None], sizes


@settings(deadline=None)
@given(pools(), st.sampled_from(["distinct", "alike", "grouped"]), st.integers(0, 3))
def test_every_step_keeps_its_size_and_chance_is_fixed(
    pool: tuple[np.ndarray, list[int]], name: str, seed: int
) -> None:
    keys, sizes = pool
    dealt = deal(name, keys, sizes, seed)
    assert np.bincount(dealt, minlength=len(sizes)).tolist() == sizes
    assert np.array_equal(dealt, deal(name, keys, sizes, seed))


@settings(deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 8))
def test_what_can_be_kept_apart_is(data: st.DataObject, steps: int, batch: int) -> None:
    """A value that occurs at most as often as there are steps of one size is never twice in one."""
    values: list[int] = []
    while len(values) < steps * batch:
        most = min(steps, steps * batch - len(values))
        values += [len(values)] * data.draw(st.integers(1, most))
    keys = np.array(data.draw(st.permutations(values)))
    dealt = deal("distinct", keys[:, None], [batch] * steps)
    assert max(Counter(zip(dealt.tolist(), keys.tolist(), strict=True)).values()) == 1


def test_staying_at_home_comes_after_being_apart() -> None:
    """Where the first four stay, nothing but the last step is left for both of the last value."""
    dealt = deal("distinct", np.array([1, 2, 1, 2, 3, 3])[:, None], [2, 2, 2])
    assert all(dealt[i] != dealt[j] for i, j in ((0, 2), (1, 3), (4, 5)))


def test_samples_are_distinct_in_all_columns_and_stay_where_nothing_clashes() -> None:
    rng = np.random.default_rng(0)
    keys = np.stack([rng.integers(0, 400, 640), rng.integers(1000, 1300, 640)], 1)
    dealt = deal("distinct", keys, [64] * 10, by=["x", "y"])
    for column in keys.T:
        assert max(Counter(zip(dealt.tolist(), column.tolist(), strict=True)).values()) == 1
    alone = np.arange(640)[:, None]
    assert np.array_equal(deal("distinct", alone, [64] * 10), np.repeat(np.arange(10), 64))


def test_what_cannot_be_kept_apart_is_spread() -> None:
    keys = np.array([7] * 10 + [*range(100, 114)])
    dealt = deal("distinct", keys[:, None], [6] * 4)
    assert sorted(Counter(dealt[:10].tolist()).values()) == [2, 2, 3, 3]


@settings(deadline=None)
@given(pools(), st.integers(0, 3))
def test_steps_are_of_one_value_but_for_remainders(pool: tuple[np.ndarray, list[int]], seed: int) -> None:
    keys, sizes = pool
    dealt = deal("alike", keys, sizes, seed)
    mixed = sum(len(set(keys[dealt == step, 0])) > 1 for step in range(len(sizes)))
    counts = Counter(keys[:, 0].tolist())
    whole = sum(count // sizes[0] for count in counts.values())
    assert mixed <= len(sizes) - whole <= len(counts)


def test_which_step_is_of_which_value_changes_with_the_pool() -> None:
    keys = np.repeat(np.arange(6), 8)[:, None]
    orders = {tuple(keys[deal("alike", keys, [8] * 6, seed) == step, 0][0] for step in range(6)) for seed in range(8)}
    assert len(orders) > 4
    rests = np.repeat(np.arange(4), 2)[:, None]  # two values share a step: not always the same two
    shared = {frozenset(rests[deal("alike", rests, [4, 4], seed) == 0, 0].tolist()) for seed in range(16)}
    assert len(shared) == 6


def test_classes_come_in_groups() -> None:
    keys = np.random.default_rng(1).permutation(np.repeat(np.arange(12), 8))
    dealt = deal("grouped", keys[:, None], [16] * 6, each=4)
    for step in range(6):
        assert sorted(Counter(keys[dealt == step].tolist()).values()) == [4, 4, 4, 4]
    lonely = deal("grouped", np.arange(12)[:, None], [4] * 3, each=2)
    assert np.array_equal(lonely, np.repeat(np.arange(3), 4))  # nothing to group: all stay


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Pairs whose answers come up to three times, in three languages, none of which divides the row groups."""
    root = tmp_path_factory.mktemp("arranged")
    made = text_corpus(root, ROWS, row_group=10)
    for fragment in made.fragments:
        path = made.fragment_url(fragment)
        table = pq.read_table(path)
        numbers = range(len(table))
        columns = {
            "positive": [f"answer {n % 50}" for n in numbers],
            "language": [LANGUAGES[n % 7 % 3] for n in numbers],
            "several": [["a", "b"]] * len(table),
        }
        for name, values in columns.items():
            if name in table.column_names:
                table = table.drop_columns(name)
            table = table.append_column(name, pa.array(values))
        pq.write_table(table, path, row_group_size=10)
    return made


def values_of(plan: Plan, samples: StepSamples, column: str) -> list[str]:
    found = []
    for number, row in zip(samples.chunk.tolist(), samples.row.tolist(), strict=True):
        chunk = plan.chunk(number)
        url = plan.corpora[chunk.corpus].fragment_url(plan.corpora[chunk.corpus].fragments[chunk.fragment])
        table = pq.ParquetFile(url).read_row_group(chunk.row_group, columns=[column])
        found.append(normal_text(table[column][row].as_py()))
    return found


def arranged(corpus: Corpus, name: str, mixture: MixtureConfig | None = None, **fields: Any) -> Plan:
    return make_plan([corpus], 5, BATCH, mixture, arrangement(name, pool=POOL, **fields))


def places(samples: StepSamples) -> list[tuple[int, int]]:
    return list(zip(samples.chunk.tolist(), samples.row.tolist(), strict=True))


@pytest.mark.parametrize("fields", [{"name": "distinct"}, {"name": "alike", "by": "language"}], ids=str)
def test_an_epoch_holds_every_sample_once_and_any_step_is_found_alone(corpus: Corpus, fields: dict[str, Any]) -> None:
    plan, plain = arranged(corpus, **fields), make_plan([corpus], 5, BATCH)
    for epoch in range(2):
        steps = [places(plan.step(epoch, step)) for step in range(plan.steps_per_epoch)]
        assert [len(each) for each in steps] == [len(plain.step(epoch, step)) for step in range(plan.steps_per_epoch)]
        assert len({place for each in steps for place in each}) == ROWS
        for step in reversed(range(plan.steps_per_epoch)):
            assert places(arranged(corpus, **fields).step(epoch, step)) == steps[step]
        for first in range(0, plan.steps_per_epoch, POOL):
            pool = range(first, min(first + POOL, plan.steps_per_epoch))
            assert {p for s in pool for p in steps[s]} == {p for s in pool for p in places(plain.step(epoch, s))}
    with pytest.raises(ValueError, match="there is no step"):
        plan.step(0, plan.steps_per_epoch)


def test_no_text_comes_twice_in_a_step(corpus: Corpus) -> None:
    plan, plain = arranged(corpus, "distinct"), make_plan([corpus], 5, BATCH)
    clashes = [
        len(samples) - len(set(values_of(each, samples, "positive")))
        for each in (plain, plan)
        for samples in [each.step(0, step) for step in range(POOL)]
    ]
    assert sum(clashes[:POOL]) > 0
    assert sum(clashes[POOL:]) == 0


def test_a_column_that_varies_within_row_groups_makes_homogeneous_steps(corpus: Corpus) -> None:
    plan = arranged(corpus, "alike", by="language")
    kinds = [len(set(values_of(plan, plan.step(0, step), "language"))) for step in range(POOL)]
    assert kinds.count(1) >= 2


def test_parts_of_a_mixture_are_arranged_too(corpus: Corpus) -> None:
    mixture = parse_config(MixtureConfig, {"exponent": 0.5}, "test")
    plan = arranged(corpus, "distinct", mixture, by="positive")
    for step in range(POOL):
        samples = plan.step(0, step)
        assert len(set(values_of(plan, samples, "positive"))) == len(samples) == BATCH


def test_workers_share_the_steps_of_one(corpus: Corpus) -> None:
    inputs = build_inputs(parse_config(ModelConfig, MODEL, "test"), train=True)

    def ids(rank: int, world: int, start: int, steps: int) -> list[list[list[int]]]:
        plan = arranged(corpus, "distinct")
        return [b.ids.tolist() for b in Loader(plan, rank, world, inputs, start=plan.at(start), steps=steps)]

    whole, (first, second) = ids(0, 1, 0, 6), (ids(rank, 2, 3, 3) for rank in range(2))
    assert whole[3:] == [a + b for a, b in zip(first, second, strict=True)]


def test_the_order_is_part_of_the_digest(corpus: Corpus) -> None:
    digests = {
        make_plan([corpus], 5, BATCH).digest,
        arranged(corpus, "distinct").digest,
        arranged(corpus, "distinct", by="positive").digest,
        arranged(corpus, "grouped", by="language").digest,
        arranged(corpus, "grouped", by="language", each=3).digest,
    }
    assert len(digests) == 5


def test_a_run_trains_on_arranged_batches_and_a_batch_is_shown(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fields = {
        "model": MODEL,
        "batch_size": BATCH,
        "steps": 5,
        "arrange": {"name": "alike", "by": "language", "pool": 4},
    }
    train(parse_config(TrainConfig, tiny_run(corpus.root, out, **fields), "test"))
    assert len(read_metrics(out / "metrics.jsonl")) == 5
    plan = make_plan([corpus], 0, BATCH, None, arrangement("alike", by="language", pool=4))
    shown = inspect_batch(str(out), 0, 2)
    answers = [each.text.split(" | ")[1] for each in shown.samples]
    assert answers == values_of(plan, plan.step(0, 2), "positive")


def test_what_cannot_be_is_one_sentence(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    for fields, message in (
        ({"name": "distinkt"}, "Did you mean 'distinct'"),
        ({"name": "distinct", "by": []}, "at least 1"),
        ({"name": "alike"}, "needs `by` to name 1 column, not 0"),
        ({"name": "alike", "by": ["x", "y"]}, "needs `by` to name 1 column, not 2"),
        ({"name": "grouped", "by": "x", "many": 3}, "many"),
        ({"name": "grouped", "by": "x", "each": 1}, "each"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(ArrangeConfig, fields, "test")
    with pytest.raises(ConfigError, match="'nowhere', which"):
        arranged(corpus, "distinct", by="nowhere")
    with pytest.raises(ConfigError, match="'several', whose values are lists"):
        arranged(corpus, "distinct", by="several")
    monkeypatch.setattr(ARRANGEMENTS["alike"], "deal", lambda self, keys, home, sizes, seed: home * 0)
    with pytest.raises(ConfigError, match="'alike' gives a step more or fewer samples"):
        arranged(corpus, "alike", by="language").step(0, 0)
