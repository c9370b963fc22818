"""Exact ranks of the correct candidates of each query, without the whole matrix of scores.

The score is the inner product of float32 embeddings. A wrong candidate whose score is within `TIE` of a correct
one stands before it: ties are counted pessimistically, so that a model which maps everything to one point scores
nothing instead of everything. Correct candidates never stand in each other's way.

Time is O(pairs x candidates x D), memory O(chunk), whatever the numbers of queries and candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TIE = 1e-6  # inner products of unit float32 vectors that differ by less are equal up to rounding
PAIRS, CANDIDATES = 1024, 8192  # a chunk of scores takes 32 MiB


@dataclass(frozen=True)
class Ranking:
    """Where the correct candidates of each query stand.

    A pair is a query and one of its correct candidates; pairs are sorted by query, then by rank.
    """

    queries: int
    candidates: int
    query: NDArray[np.int64]  # [P] query of each pair
    rank: NDArray[np.int64]  # [P] place of the pair's candidate, from 1
    correct: NDArray[np.int64]  # [Q] number of correct candidates of each query

    @property
    def first(self) -> NDArray[np.int64]:
        """[Q] rank of the first correct candidate of each query."""
        starts = np.concatenate([[0], np.cumsum(self.correct)[:-1]])
        return self.rank[starts]


def rank_pairs(queries_QD: Tensor, candidates_CD: Tensor, pairs_P2: NDArray[np.int64]) -> Ranking:
    """Rank the correct candidates of each query among all candidates.

    Args:
        queries_QD: embeddings, float32; every query must occur in `pairs_P2`.
        candidates_CD: embeddings, float32, on the same device.
        pairs_P2: distinct (query, correct candidate) rows, in any order.
    """
    pairs = pairs_P2[np.lexsort((pairs_P2[:, 1], pairs_P2[:, 0]))]
    query, candidate = pairs[:, 0], pairs[:, 1]
    correct = np.bincount(query, minlength=len(queries_QD))
    if len(correct) != len(queries_QD) or not correct.all():
        raise ValueError("every query needs at least one correct candidate")
    score = np.empty(len(pairs), dtype=np.float32)
    above = np.empty(len(pairs), dtype=np.int64)
    for start in range(0, len(pairs), PAIRS):
        rows = slice(start, min(start + PAIRS, len(pairs)))
        left = queries_QD[torch.from_numpy(query[rows]).to(queries_QD.device)]
        right = candidates_CD[torch.from_numpy(candidate[rows]).to(queries_QD.device)]
        own = (left * right).sum(dim=1)
        count = torch.zeros(len(own), dtype=torch.int64, device=own.device)
        for column in range(0, len(candidates_CD), CANDIDATES):
            scores = left @ candidates_CD[column : column + CANDIDATES].T
            count += (scores >= (own - TIE)[:, None]).sum(dim=1)
        score[rows], above[rows] = own.cpu().numpy(), count.cpu().numpy()
    order = np.lexsort((-score, query))
    score, above = score[order], above[order]
    starts = np.concatenate([[0], np.cumsum(correct)[:-1]])
    rank = np.empty(len(pairs), dtype=np.int64)
    for start, many in zip(starts.tolist(), correct.tolist(), strict=True):
        own_scores = score[start : start + many]  # falling
        # Of those counted, the query's other correct candidates are no competitors.
        friends = np.searchsorted(-own_scores, -(own_scores - np.float32(TIE)), side="right")
        wrong = np.maximum(above[start : start + many] - friends, 0)
        rank[start : start + many] = wrong + np.arange(1, many + 1)
    return Ranking(len(queries_QD), len(candidates_CD), query[order], rank, correct)


def top_candidates(queries_QD: Tensor, candidates_CD: Tensor, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k best candidates of each query and their scores, best first, ties by position. Returns [Q, k], [Q, k]."""
    k = min(k, len(candidates_CD))
    best_scores = torch.empty(len(queries_QD), 0, device=queries_QD.device)
    best = torch.empty(len(queries_QD), 0, dtype=torch.int64, device=queries_QD.device)
    for column in range(0, len(candidates_CD), CANDIDATES):
        scores = queries_QD @ candidates_CD[column : column + CANDIDATES].T
        places = torch.arange(column, column + scores.shape[1], device=scores.device).expand_as(scores)
        scores, places = torch.cat([best_scores, scores], dim=1), torch.cat([best, places], dim=1)
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        best_scores, best = scores.gather(1, order), places.gather(1, order)
    return best.cpu().numpy(), best_scores.cpu().numpy()


def recall_at(ranking: Ranking, k: int) -> float:
    """Share of queries with a correct candidate among the first k."""
    return float(np.mean(ranking.first <= k))


def mean_reciprocal_rank(ranking: Ranking) -> float:
    """Mean of 1 / rank of the first correct candidate."""
    return float(np.mean(1.0 / ranking.first))


def ndcg_at(ranking: Ranking, k: int) -> float:
    """Mean nDCG@k, binary gains: sum of 1/log2(1 + rank) over correct ranks up to k, over that of an ideal order."""
    gains = np.where(ranking.rank <= k, 1.0 / np.log2(1.0 + ranking.rank), 0.0)
    found = np.bincount(ranking.query, weights=gains, minlength=ranking.queries)
    ideal = np.cumsum(1.0 / np.log2(np.arange(2, k + 2)))
    return float(np.mean(found / ideal[np.minimum(ranking.correct, k) - 1]))
