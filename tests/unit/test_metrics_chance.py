"""Chance levels against simulation and against small cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cl.evaluation import chance

RNG = np.random.default_rng(7)


def simulated_ranks(correct: np.ndarray, candidates: int, trials: int = 20_000) -> np.ndarray:
    """[trials, Q, max m] ranks (from 1, sorted) of the correct candidates in random orders; inf beyond m."""
    ranks = np.full((trials, len(correct), correct.max()), np.inf)
    for q, m in enumerate(correct):
        for trial in range(trials):
            ranks[trial, q, :m] = np.sort(RNG.choice(candidates, size=m, replace=False) + 1)
    return ranks


@pytest.fixture(scope="module")
def simulation() -> tuple[np.ndarray, int, np.ndarray]:
    correct, candidates = np.array([1, 1, 2, 5]), 20
    return correct, candidates, simulated_ranks(correct, candidates)


def test_recall(simulation: tuple[np.ndarray, int, np.ndarray]) -> None:
    correct, n, ranks = simulation
    for k in (1, 3, 10):
        assert chance.recall(correct, n, k) == pytest.approx(np.mean(ranks[:, :, 0] <= k), abs=0.005)


def test_reciprocal_rank(simulation: tuple[np.ndarray, int, np.ndarray]) -> None:
    correct, n, ranks = simulation
    assert chance.reciprocal_rank(correct, n) == pytest.approx(np.mean(1 / ranks[:, :, 0]), abs=0.005)


def test_median(simulation: tuple[np.ndarray, int, np.ndarray]) -> None:
    correct, n, ranks = simulation
    assert chance.median_rank(correct, n) == pytest.approx(np.median(ranks[:, :, 0]), abs=0.5)


def test_ndcg(simulation: tuple[np.ndarray, int, np.ndarray]) -> None:
    correct, n, ranks = simulation
    gains = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).sum(axis=2)
    ideal = np.array([sum(1 / np.log2(1 + r) for r in range(1, min(m, 10) + 1)) for m in correct])
    assert chance.ndcg(correct, n, 10) == pytest.approx(np.mean(gains / ideal), abs=0.005)


def test_one_correct_candidate_gives_the_familiar_levels() -> None:
    correct = np.ones(50, dtype=np.int64)
    assert chance.recall(correct, 1000, 10) == pytest.approx(0.01, rel=1e-12)
    assert chance.recall(correct, 1000, 500) == pytest.approx(0.5, rel=1e-9)  # by logarithms of factorials
    assert chance.recall(correct, 5, 10) == 1.0
    assert chance.median_rank(correct, 1000) == 500.5
    assert chance.median_rank(correct, 999) == 500
    assert chance.reciprocal_rank(correct, 4) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


def test_everything_correct_is_certain() -> None:
    correct = np.array([6, 6])
    assert chance.recall(correct, 6, 1) == 1.0
    assert chance.reciprocal_rank(correct, 6) == pytest.approx(1.0)
    assert chance.ndcg(correct, 6, 10) == pytest.approx(1.0)
    assert chance.median_rank(correct, 6) == 1.0


def test_short_products_and_logarithms_agree() -> None:
    correct = np.array([1, 3, 40])
    direct = np.array([np.prod([(500 - m - i) / (500 - i) for i in range(65)]) for m in correct])
    np.testing.assert_allclose(chance.survival(correct, 500, 65), direct, rtol=1e-9)
    np.testing.assert_allclose(chance.survival(correct, 500, 64), direct / ((500 - correct - 64) / 436), rtol=1e-9)
