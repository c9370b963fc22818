"""Ranks and what is made of them, against brute force over the whole matrix of scores in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cl.evaluation import ranks
from cl.evaluation.ranks import mean_reciprocal_rank, ndcg_at, rank_pairs, recall_at, top_candidates
from tests.unit.embedded import unit_rows

Problem = tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]


def brute_ranks(
    queries: NDArray[np.float64], candidates: NDArray[np.float64], relevant: NDArray[np.bool_]
) -> list[list[int]]:
    """For each query the ranks of its correct candidates: order by score, at ties wrong ones first."""
    found = []
    for row, scores in enumerate(np.round(queries @ candidates.T, 5)):
        order = sorted(range(len(scores)), key=lambda c: (-scores[c], relevant[row, c]))
        found.append([place + 1 for place, c in enumerate(order) if relevant[row, c]])
    return found


def relevance(pairs: NDArray[np.int64], queries: int, candidates: int) -> NDArray[np.bool_]:
    table = np.zeros((queries, candidates), dtype=bool)
    table[pairs[:, 0], pairs[:, 1]] = True
    return table


def random_problem(queries: int, candidates: int, more: int, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    base = np.stack([np.arange(queries), rng.integers(candidates, size=queries)], axis=1)
    extra = np.stack([rng.integers(queries, size=more), rng.integers(candidates, size=more)], axis=1)
    pairs = rng.permutation(np.unique(np.concatenate([base, extra]), axis=0))
    return unit_rows(rng, queries, 16), unit_rows(rng, candidates, 16), pairs


@pytest.fixture(params=[(1024, 8192), (7, 11)], ids=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PAIRS", request.param[0])
    monkeypatch.setattr(ranks, "CANDIDATES", request.param[1])


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("queries", "candidates", "more"), [(40, 40, 0), (30, 90, 60), (90, 30, 200), (1, 1, 0)])
def test_ranks_equal_brute_force(queries: int, candidates: int, more: int) -> None:
    q, c, pairs = random_problem(queries, candidates, more)
    expected = brute_ranks(q.double().numpy(), c.double().numpy(), relevance(pairs, queries, candidates))
    ranking = rank_pairs(q, c, pairs)
    assert [ranking.rank[ranking.query == row].tolist() for row in range(queries)] == expected

    first = np.array([own[0] for own in expected])
    assert ranking.first.tolist() == first.tolist()
    assert recall_at(ranking, 5) == pytest.approx(np.mean(first <= 5), abs=1e-15)
    assert mean_reciprocal_rank(ranking) == pytest.approx(np.mean(1 / first), abs=1e-15)
    dcg = [sum(1 / np.log2(1 + r) for r in own if r <= 10) for own in expected]
    ideal = [sum(1 / np.log2(1 + r) for r in range(1, min(len(own), 10) + 1)) for own in expected]
    assert ndcg_at(ranking, 10) == pytest.approx(np.mean(np.array(dcg) / ideal), abs=1e-12)


def test_ndcg_equals_scikit_learn() -> None:
    from sklearn import metrics

    q, c, pairs = random_problem(30, 50, 80)
    gains = relevance(pairs, 30, 50).astype(float)
    expected = metrics.ndcg_score(gains, (q.double() @ c.double().T).numpy(), k=10)
    assert ndcg_at(rank_pairs(q, c, pairs), 10) == pytest.approx(expected, abs=1e-9)


# Few directions on purpose, so that most scores are tied.
DIRECTIONS = torch.eye(3)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_ties_count_against_the_model(data: st.DataObject) -> None:
    queries, candidates = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    kind = st.integers(0, 2)
    q = DIRECTIONS[data.draw(st.lists(kind, min_size=queries, max_size=queries))]
    c = DIRECTIONS[data.draw(st.lists(kind, min_size=candidates, max_size=candidates))]
    sets = [data.draw(st.sets(st.integers(0, candidates - 1), min_size=1)) for _ in range(queries)]
    pairs = np.array([(row, item) for row, items in enumerate(sets) for item in sorted(items)])
    expected = brute_ranks(q.double().numpy(), c.double().numpy(), relevance(pairs, queries, candidates))
    ranking = rank_pairs(q, c, pairs)
    assert [ranking.rank[ranking.query == row].tolist() for row in range(queries)] == expected


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_order_of_pairs_and_candidates_does_not_matter(seed: int) -> None:
    q, c, pairs = random_problem(12, 9, 15, seed)
    rng = np.random.default_rng(seed + 1)
    moved = rng.permutation(len(c))  # candidate moved[i] stands at place i
    place = np.argsort(moved)
    shuffled = rng.permutation(np.stack([pairs[:, 0], place[pairs[:, 1]]], axis=1))
    assert rank_pairs(q, c[moved], shuffled).rank.tolist() == rank_pairs(q, c, pairs).rank.tolist()


def test_a_collapsed_model_scores_nothing() -> None:
    one = torch.ones(50, 4) / 2
    ranking = rank_pairs(one, one, np.stack([np.arange(50)] * 2, axis=1))
    assert ranking.first.tolist() == [50] * 50
    assert recall_at(ranking, 10) == 0.0


def test_a_query_without_a_correct_candidate_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one correct"):
        rank_pairs(torch.eye(3), torch.eye(3), np.array([[0, 0], [2, 2]]))


@pytest.mark.usefixtures("chunks")
def test_top_candidates() -> None:
    q, c, _ = random_problem(9, 40, 0)
    places, scores = top_candidates(q, c, 5)
    full = (q.double() @ c.double().T).numpy()
    np.testing.assert_array_equal(places, np.argsort(-full, axis=1)[:, :5])
    np.testing.assert_allclose(scores, -np.sort(-full, axis=1)[:, :5], atol=1e-6)
    tied, _ = top_candidates(torch.ones(1, 1), torch.ones(30, 1), 5)
    assert tied.tolist() == [[0, 1, 2, 3, 4]]
    assert top_candidates(q, c[:3], 5)[0].shape == (9, 3)
