"""Cluster-balanced selection: common things are thinned out, rare ones stay.

A cluster of n rows keeps min(n, c), where the cap c is such that the sum over clusters is the target; of the clusters
at the cap as many keep one more as the target needs, so exactly the target is kept (the flat form of the sampling in
Vo et al. 2024). Within a cluster the choice is by a keyed hash of the id, or by the distance to the centre, then id.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from cl.corpus import Kind
from pipelines.keyed import keyed_hash
from pipelines.stages.base import Output, Rows, reasons
from pipelines.stages.keyed import Streams
from pipelines.stages.registry import STAGES
from pipelines.stages.selection import FLOAT32, HASHED, Digits, Groups, Keys, Selection, ascending, keys_of, selected


def quotas(sizes: np.ndarray, target: int) -> np.ndarray:
    """Rows that each cluster keeps: min(size, c), and one more for the first clusters above c until the sum is right.

    Args:
        sizes: int64 [clusters].
        target: rows to keep; at most the sum of sizes.
    """
    target = min(target, int(sizes.sum()))
    low, high = 0, int(sizes.max(initial=0))  # the largest c with sum min(c, size) <= target
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(sizes, middle).sum() <= target:
            low = middle
        else:
            high = middle - 1
    kept = np.minimum(sizes, low)
    larger = np.flatnonzero(sizes > low)[: target - int(kept.sum())]
    kept[larger] += 1
    return kept


@STAGES.register(
    "balance",
    "Keep a target number of rows, evenly over clusters: a cap on every cluster, a keyed choice within",
    "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach",
)
class Balance(Selection):
    """A task holds 32 bytes a row of its partition, and some 60 bytes a cluster."""

    version: ClassVar[int] = 2
    drops: ClassVar[bool] = True
    seeded: ClassVar[bool] = True

    target: int | None = Field(None, ge=1, description="rows to keep")
    fraction: float | None = Field(None, gt=0, le=1, description="of the living rows to keep, in place of target")
    column: str = Field("cluster", description="the column that holds the clusters")
    choose: Literal["random", "closest"] = Field(
        "random", description="which rows of a cluster: keyed coin, or nearest"
    )

    @model_validator(mode="after")
    def _one_of(self) -> Balance:
        if (self.target is None) == (self.fraction is None):
            raise ValueError("give either target or fraction")
        return self

    def needs(self, kind: Kind) -> list[str]:
        return [self.column] + (["cluster_distance"] if self.choose == "closest" else [])

    def digits(self) -> Digits:
        return FLOAT32 if self.choose == "closest" else HASHED

    def keys(self, rows: Rows) -> Keys:
        """The cluster of each row, and its place in it."""
        if self.choose == "closest":
            key = ascending(rows.numbers("cluster_distance").astype(np.float32))
        else:
            key = keyed_hash(rows.seed, rows.table["id"].to_pylist(), "balance")
        return keys_of(rows, rows.table[self.column].cast(pa.int64()).to_numpy(), key)

    def wanted(self, groups: Groups) -> int:
        """How many rows are to be kept."""
        return self.target if self.target is not None else round((self.fraction or 1.0) * int(groups.size.sum()))

    def partial(self, rows: Rows, partitions: int) -> Streams:
        return self.send_keys(self.keys(rows), partitions)

    def quotas(self, groups: Groups) -> np.ndarray:
        return quotas(groups.size, self.wanted(groups))

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        return Output(drop=reasons(len(rows), {"cluster_over_cap": ~selected(self.keys(rows), reduced)}))
