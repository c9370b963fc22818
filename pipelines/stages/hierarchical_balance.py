"""Balanced sampling over a hierarchy of clusters: on each level, what is common is thinned out.

Vo et al. 2024: the target is shared among the clusters of the highest level, each of n rows getting
min(n, c) with c such that the sum is the target; the share of a cluster is shared in the same way among the clusters
in it, and so on. Of the lowest clusters so many rows stay, by a keyed hash of the id, or the closest to the centre.
Where c does not come out even, the clusters with the smallest numbers get one more; exactly the target is kept.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.stages.balance import Balance, quotas
from pipelines.stages.base import Rows
from pipelines.stages.hierarchical_clusters import level_column
from pipelines.stages.keyed import Streams
from pipelines.stages.registry import STAGES
from pipelines.stages.selection import Groups


def tree_quotas(sizes: np.ndarray, path: list[np.ndarray], target: int) -> np.ndarray:
    """Rows that each of the lowest clusters keeps, int64 [g].

    Args:
        sizes: int64 [g].
        path: the cluster of each that it lies in, int64 [g], of each level above, the highest first.
    """
    if not path:
        return quotas(sizes, target)
    clusters, within = np.unique(path[0], return_inverse=True)
    shares = quotas(np.bincount(within, sizes).astype(np.int64), target)
    out = np.zeros(len(sizes), np.int64)
    for number in range(len(clusters)):
        mine = np.flatnonzero(within == number)
        out[mine] = tree_quotas(sizes[mine], [level[mine] for level in path[1:]], int(shares[number]))
    return out


@STAGES.register(
    "hierarchical_balance",
    "Keep a target number of rows, evenly over hierarchical clusters on every level",
    "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach",
)
class HierarchicalBalance(Balance):
    """A task holds 40 bytes a row of its partition, and some 80 bytes a cluster."""

    levels: int = Field(2, ge=2, description="levels of hierarchical_clusters, the finest included")

    def above(self) -> tuple[str, ...]:
        return tuple(level_column(level) for level in range(self.levels, 1, -1))

    def needs(self, kind: Kind) -> list[str]:
        return [*super().needs(kind), *self.above()]

    def partial(self, rows: Rows, partitions: int) -> Streams:
        above = [rows.table[name].cast(pa.int64()).to_numpy() for name in self.above()]
        return self.send_keys(self.keys(rows), partitions, above=above)

    def quotas(self, groups: Groups) -> np.ndarray:
        path = [groups.above[name] for name in self.above()]
        return tree_quotas(groups.size, path, self.wanted(groups))
