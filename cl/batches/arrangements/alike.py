"""Each step of one value: of one language, task, source or cluster, whatever lies together on disk.

    arrange: {name: alike, by: language}
    arrange: {name: alike, by: cluster, pool: 64}

Negatives of the same source or cluster cannot be told by what the source looks like, and are harder (Li et al. 2023,
"Towards General Text Embeddings with Multi-stage Contrastive Learning", section 3.2; Morris and Rush 2024, "Contextual
Document Embeddings": batches of clusters). `mixture: {homogeneous: true}` does it for corpora and for
columns that divide row groups, with shares and without remainders; this does it for any column.

With n_v samples of value v in the pool, whole steps of it are as many as fit; what is left of the values shares the
remaining steps, so a pool has at most as many mixed steps as values.
"""

from __future__ import annotations

import numpy as np

from cl.batches.arrangements.base import ARRANGEMENTS, Arrangement
from cl.batches.hashing import permutation


@ARRANGEMENTS.register("alike", "each step holds samples of one value of a column, as far as they go")
class Alike(Arrangement):
    """Samples in the order of their values, cut into steps, and the steps shuffled."""

    def deal(self, keys: np.ndarray, home: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
        values, value = np.unique(keys[:, 0], return_inverse=True)
        value = permutation(len(values), seed, 0)[value]  # no value is always the first
        counts = np.bincount(value)
        order = np.argsort(value, kind="stable")
        nth = np.empty(len(order), np.int64)  # how many of the same value come before
        nth[order] = np.arange(len(order)) - (np.cumsum(counts) - counts)[value[order]]
        most = int(sizes.max())
        whole = nth < counts[value] // most * most  # of a step that the value fills
        order = np.lexsort((value, ~whole))
        full = np.flatnonzero(sizes == most)
        places = np.concatenate([full[permutation(len(full), seed, 1)], np.flatnonzero(sizes < most)])
        step = np.empty(len(order), np.int64)
        step[order] = np.repeat(places, sizes[places])
        return step
