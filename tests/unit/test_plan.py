"""The plan of an epoch: every sample once, the same steps for any number of workers, any step found directly."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl.batches.apportion import taken
from cl.batches.hashing import mix, permutation
from cl.batches.plan import BatchPlan
from cl.batches.steps import StepSamples
from cl.errors import ConfigError, DataError
from tests.unit.corpora import described_corpus

CHUNKS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=1, max_size=25).filter(
    lambda chunks: sum(rows for rows, _ in chunks) > 0
)


def pairs(samples: StepSamples) -> list[tuple[int, int]]:
    return list(zip(samples.chunk.tolist(), samples.row.tolist(), strict=True))


def epoch_of(plan: BatchPlan, epoch: int) -> list[list[tuple[int, int]]]:
    return [pairs(plan.step(epoch, step)) for step in range(plan.steps_per_epoch)]


@settings(max_examples=60, deadline=None)
@given(chunks=CHUNKS, batch=st.integers(1, 40), window=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_epoch_holds_every_sample_once(chunks: list[tuple[int, int]], batch: int, window: int, seed: int) -> None:
    corpus = described_corpus(chunks)
    plan = BatchPlan([corpus], seed, batch, window)
    steps = epoch_of(plan, 1)
    assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
    rows = [rows for rows, _ in chunks if rows]
    assert sorted(chain.from_iterable(steps)) == [(chunk, row) for chunk, n in enumerate(rows) for row in range(n)]


@settings(max_examples=40, deadline=None)
@given(chunks=CHUNKS, batch=st.integers(1, 40), seed=st.integers(0, 100))
def test_steps_do_not_depend_on_the_number_of_workers(chunks: list[tuple[int, int]], batch: int, seed: int) -> None:
    plan = BatchPlan([described_corpus(chunks)], seed, batch)
    for step in range(plan.steps_per_epoch):
        whole = plan.step(0, step)
        for world in (1, 2, 3, 5):
            parts = [plan.part(whole, rank, world) for rank in range(world)]
            assert [pair for part in parts for pair in pairs(part)] == pairs(whole)
            bounds = [plan.part_bounds(rank, world) for rank in range(world)]
            assert max(high - low for low, high in bounds) - min(high - low for low, high in bounds) <= 1


@settings(max_examples=40, deadline=None)
@given(chunks=CHUNKS, batch=st.integers(1, 15), epoch=st.integers(0, 5))
def test_any_step_is_found_without_those_before_it(chunks: list[tuple[int, int]], batch: int, epoch: int) -> None:
    """A plan that was never asked for anything else answers the same: resume needs (epoch, step) alone."""
    steps = epoch_of(BatchPlan([described_corpus(chunks)], 3, batch), epoch)
    for step in reversed(range(len(steps))):
        assert pairs(BatchPlan([described_corpus(chunks)], 3, batch).step(epoch, step)) == steps[step]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    corpus = described_corpus([(10, i % 4) for i in range(20)])
    first = epoch_of(BatchPlan([corpus], 0, 16), 0)
    assert first == epoch_of(BatchPlan([corpus], 0, 16), 0)
    assert first != epoch_of(BatchPlan([corpus], 0, 16), 1)
    assert first != epoch_of(BatchPlan([corpus], 1, 16), 0)


def test_order_is_pinned() -> None:
    """A run can be resumed by a later version: these numbers must never change."""
    plan = BatchPlan([described_corpus([(3, 0), (4, 1), (2, 0), (3, 1)])], 7, 5)
    assert pairs(plan.step(2, 1)) == PINNED


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_apportionment_is_the_order_by_time(sizes: list[int]) -> None:
    """Against the definition: sort all samples by ((k - 1/2) / n, lane) in exact arithmetic, and count."""
    order = sorted((Fraction(2 * k - 1, 2 * n), lane) for lane, n in enumerate(sizes) for k in range(1, n + 1))
    counts = np.zeros(len(sizes), dtype=np.int64)
    for position in range(len(order) + 1):
        assert taken(np.array(sizes), position).tolist() == counts.tolist()
        if position < len(order):
            counts[order[position][1]] += 1


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=40), share=st.floats(0, 1), step=st.integers(1, 4096))
def test_apportionment_of_large_lanes_is_monotone(sizes: list[int], share: float, step: int) -> None:
    array = np.array(sizes, dtype=np.int64)
    start = int(share * int(array.sum()))
    stop = min(start + step, int(array.sum()))
    low, high = taken(array, start), taken(array, stop)
    assert int(low.sum()) == start
    assert int(high.sum()) == stop
    assert (low <= high).all()
    assert (high <= array).all()


def test_steps_hold_each_lane_in_proportion() -> None:
    plan = BatchPlan([described_corpus([(30, 0)] * 10 + [(30, 1)] * 20)], 0, 30)
    for step in range(plan.steps_per_epoch):
        lanes = plan.step(0, step).chunk >= 10
        assert 19 <= int(lanes.sum()) <= 21


def test_few_chunks_are_in_use_at_a_time() -> None:
    """Windows bound what a loader must hold: chunks come and go, none returns later in the epoch."""
    window, lanes = 3, 4
    plan = BatchPlan([described_corpus([(20, i % lanes) for i in range(80)])], 0, 40, window)
    seen: dict[int, list[int]] = {}
    for step in range(plan.steps_per_epoch):
        for chunk in set(plan.step(0, step).chunk.tolist()):
            seen.setdefault(chunk, []).append(step)
    # A window of a lane is 60 samples; a step takes 10 of each lane: at most 7 steps touch it.
    assert max(steps[-1] - steps[0] for steps in seen.values()) <= 6
    # Within an epoch samples of a window are mixed: its chunks do not come one after the other.
    assert min(len(steps) for steps in seen.values()) >= 2


def test_memory_grows_with_chunks_and_not_with_samples() -> None:
    def peak(rows: int) -> int:
        tracemalloc.start()
        plan = BatchPlan([described_corpus([(rows, i % 8) for i in range(400)])], 0, 256, window=1)
        for step in (0, 1, plan.steps_per_epoch // 2):
            plan.step(0, step)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    # 400 x 2,000 samples against 400 x 20: only the windows in use may grow (8 lanes x 2 windows x 2,000 rows).
    assert peak(2000) - peak(20) < 3e6 < 400 * 2000 * 8


def test_several_corpora_are_mixed_in_proportion() -> None:
    plan = BatchPlan([described_corpus([(10, 0)] * 10), described_corpus([(10, 0)] * 30)], 0, 40)
    for step in range(plan.steps_per_epoch):
        samples = plan.step(0, step)
        second = [plan.chunk(int(chunk)).corpus for chunk in samples.chunk]
        assert sum(second) == 30


def test_unshuffled_is_the_order_on_disk() -> None:
    plan = BatchPlan([described_corpus([(3, 5), (2, 1)])], 0, 2, shuffle=False)
    assert list(chain.from_iterable(epoch_of(plan, 0))) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_positions() -> None:
    plan = BatchPlan([described_corpus([(10, 0)])], 0, 4)
    assert plan.steps_per_epoch == 3
    assert plan.next(0, 1) == (0, 2)
    assert plan.next(0, 2) == (1, 0)
    assert plan.at(7) == (2, 1)
    assert len(plan.step(0, 2)) == 2
    with pytest.raises(ValueError, match="no step 3"):
        plan.step(0, 3)


def test_digest_changes_with_what_changes_the_order() -> None:
    chunks = [(10, 0), (10, 1)]
    digest = BatchPlan([described_corpus(chunks)], 0, 4).digest
    assert digest == BatchPlan([described_corpus(chunks)], 0, 4).digest
    others = [
        BatchPlan([described_corpus(chunks)], 1, 4),
        BatchPlan([described_corpus(chunks)], 0, 5),
        BatchPlan([described_corpus(chunks)], 0, 4, window=2),
        BatchPlan([described_corpus([(10, 0), (10, 0)])], 0, 4),
    ]
    assert digest not in {plan.digest for plan in others}


def test_errors() -> None:
    corpus = described_corpus([(10, 0)])
    with pytest.raises(ConfigError, match="at least 1"):
        BatchPlan([corpus], 0, 0)
    with pytest.raises(ConfigError, match="one kind"):
        BatchPlan([corpus, described_corpus([(1, 0)], "image-text")], 0, 4)
    with pytest.raises(DataError, match="no samples"):
        BatchPlan([described_corpus([(0, 0)])], 0, 4)
    fragment = corpus.fragments[0].model_copy(update={"row_groups": [5, 5], "lanes": [0]})
    with pytest.raises(DataError, match="2 row groups"):
        BatchPlan([corpus.model_copy(update={"fragments": [fragment]})], 0, 4)


def test_hashes_are_permutations_and_pinned() -> None:
    assert sorted(permutation(1000, 1, 2).tolist()) == list(range(1000))
    assert [int(x) for x in mix(1, np.arange(2))] == PINNED_HASHES
    assert int(mix(-1)) == int(mix(2**64 - 1))


def test_permutations_are_fair() -> None:
    """All 24 orders of four items come about equally often: chi-square under its 99.9 % bound."""
    counts: dict[tuple[int, ...], int] = {}
    for key in range(2400):
        order = tuple(permutation(4, 5, key).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 49.7


PINNED = [(0, 0), (0, 1), (3, 2), (1, 0), (1, 3)]
PINNED_HASHES = [15000229702429136655, 9350235682965511089]
