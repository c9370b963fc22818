"""Exact nearest neighbours by inner product, tile by tile: the same whatever the tiles, threads and processors.

Embeddings are float16, so the product of two numbers is a multiple of 2^-48, and for vectors of about length 1 every
partial sum fits a float64: added up in any order, the score of two vectors is one number. A tile is computed in
float32, which is faster; only what the rounding of float32 leaves open is computed again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ROWS = 1024  # queries of a tile
DOCUMENTS = 8192  # documents of a tile: 32 MiB of scores
PAIRS = 1 << 24  # numbers of float64 that exact scores hold at a time

Skip = tuple[np.ndarray, np.ndarray]  # places (query, document) that do not count, int64 [pairs] each


class Documents(NamedTuple):
    """What queries are compared with.

    Attributes:
        vectors: float32 [m, D] of float16 numbers.
        ids: uint64 [m, 2].
        refs: int64 [m], anything that goes with a document.
    """

    vectors: np.ndarray
    ids: np.ndarray
    refs: np.ndarray


def exact_scores(left: np.ndarray, i: np.ndarray, right: np.ndarray, j: np.ndarray) -> np.ndarray:
    """float64 [pairs]: the inner products of left[i] and right[j], float32 [n, D] and [m, D]."""
    out = np.empty(len(i), np.float64)
    step = max(PAIRS // max(left.shape[1], 1), 1)
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        out[part] = np.einsum("nd,nd->n", left[i[part]].astype(np.float64), right[j[part]].astype(np.float64))
    return out


def rounding(queries: np.ndarray, documents: np.ndarray) -> float:
    """By how much a float32 score, or limit, of these vectors may differ from the exact one (Higham 2002, eq. 3.5)."""
    longest = [float(np.sqrt(np.einsum("nd,nd->n", part, part).max(initial=0))) for part in (queries, documents)]
    return 1.01 * (queries.shape[1] + 2) * 2.0**-24 * longest[0] * longest[1]


def count_better(queries: np.ndarray, documents: np.ndarray, limit: np.ndarray, skip: Skip) -> np.ndarray:
    """How many documents score above a limit of each query; those that equal it do not.

    Args:
        queries: float32 [n, D] of float16 numbers.
        documents: float32 [m, D] of float16 numbers.
        limit: float64 [n], exact scores.

    Returns:
        int64 [n]
    """
    out = np.zeros(len(queries), np.int64)
    for start in range(0, len(queries), ROWS):
        part = queries[start : start + ROWS]
        score = _tile(part, documents, start, skip)
        slack = rounding(part, documents)
        line = limit[start : start + ROWS]
        above = score > (line + slack).astype(np.float32)[:, None]
        out[start : start + ROWS] = above.sum(1)
        i, j = np.nonzero((score >= (line - slack).astype(np.float32)[:, None]) & ~above)
        better = exact_scores(part, i, documents, j) > line[i]
        out[start : start + ROWS] += np.bincount(i[better], minlength=len(part))
    return out


class Nearest:
    """The `count` nearest of all documents that were added, for each of n queries; ties go to the smaller id.

    Attributes:
        score: float64 [n, count], descending; -inf where there are fewer documents.
        ids: uint64 [n, count, 2].
        refs: int64 [n, count].
    """

    def __init__(self, queries: np.ndarray, count: int) -> None:
        self.queries, self.count = queries, count
        self.score = np.full((len(queries), count), -np.inf)
        self.ids = np.full((len(queries), count, 2), np.iinfo(np.uint64).max, np.uint64)
        self.refs = np.full((len(queries), count), -1, np.int64)

    def add(self, documents: Documents, skip: Skip) -> None:
        """Compare all queries with further documents."""
        for start in range(0, len(self.queries), ROWS):
            part = self.queries[start : start + ROWS]
            score = _tile(part, documents.vectors, start, skip)
            slack = rounding(part, documents.vectors)
            line = self.score[start : start + ROWS, -1] - slack
            wide = score.shape[1] > self.count and bool(np.isneginf(line).any())
            if wide:  # early tiles: nothing below the tile's own `count`-th score can be among the nearest
                last = np.partition(score, -self.count, axis=1)[:, -self.count].astype(np.float64)
                line = np.maximum(line, last - 2 * slack)
            lowest = np.finfo(np.float32).min  # -inf stands for a document that does not count
            i, j = np.nonzero(score >= np.maximum(line, lowest).astype(np.float32)[:, None])
            if len(i):
                self._merge(start + i, documents, j, exact_scores(part, i, documents.vectors, j))

    def _merge(self, row: np.ndarray, documents: Documents, j: np.ndarray, score: np.ndarray) -> None:
        """Put scored documents in their places."""
        rows, inverse = np.unique(row, return_inverse=True)
        owner = np.concatenate([np.repeat(np.arange(len(rows)), self.count), inverse])
        values = np.concatenate([self.score[rows].ravel(), score])
        ids = np.concatenate([self.ids[rows].reshape(-1, 2), documents.ids[j]])
        refs = np.concatenate([self.refs[rows].ravel(), documents.refs[j]])
        order = np.lexsort((-values, owner))
        found, of = values[order], owner[order]
        same = (found[1:] == found[:-1]) & (of[1:] == of[:-1]) & np.isfinite(found[1:])
        if same.any():  # only ties need the ids
            order = np.lexsort((ids[:, 1], ids[:, 0], -values, owner))
        owner = owner[order]
        place = np.arange(len(order)) - np.searchsorted(owner, owner)
        kept = place < self.count
        order, target = order[kept], (rows[owner[kept]], place[kept])
        self.score[target], self.ids[target], self.refs[target] = values[order], ids[order], refs[order]


def _tile(queries: np.ndarray, documents: np.ndarray, start: int, skip: Skip) -> np.ndarray:
    """float32 [queries, documents]: scores, -inf where a pair does not count; `start` is the first query's number."""
    score: np.ndarray = queries @ documents.T
    mine = (skip[0] >= start) & (skip[0] < start + len(queries))
    score[skip[0][mine] - start, skip[1][mine]] = -np.inf
    return score
