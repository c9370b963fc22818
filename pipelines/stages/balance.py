"""Cluster-balanced selection: common things are thinned out, rare ones stay.

A cluster of n rows keeps min(n, c), where the cap c is such that the sum over clusters is the target; of the clusters
at the cap as many keep one more as the target needs, so exactly the target is kept (the flat form of the sampling in
Vo et al. 2024). Within a cluster the choice is by a keyed hash of the id, or the rows closest to the centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from cl.corpus import Kind
from pipelines.keyed import id_words, keyed_hash
from pipelines.stages.base import Context, GlobalStage, Output, Rows, reasons
from pipelines.stages.registry import STAGES

PARTIAL = pa.schema(
    [
        ("cluster", pa.int64()),
        ("order", pa.float64()),
        ("coin", pa.uint64()),
        ("id0", pa.uint64()),
        ("id1", pa.uint64()),
    ]
)
REDUCED = pa.schema([("kept", pa.bool_())])


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
class Balance(GlobalStage):
    """The reduction holds about 60 bytes a living row."""

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

    def partial(self, rows: Rows) -> pa.Table:
        ids = rows.table["id"].to_pylist()
        words = id_words(ids)
        order = rows.numbers("cluster_distance") if self.choose == "closest" else np.zeros(len(rows))
        cluster = rows.table[self.column].cast(pa.int64())
        columns = [cluster, order, keyed_hash(rows.seed, ids, "balance"), words[:, 0], words[:, 1]]
        return pa.table(columns, schema=PARTIAL)

    def reduce(self, partials: Sequence[pa.Table], context: Context) -> list[pa.Table]:
        tables = list(partials)
        table = pa.concat_tables(tables)
        cluster, first, coin, id0, id1 = (table[name].to_numpy() for name in PARTIAL.names)
        _, index, sizes = np.unique(cluster, return_inverse=True, return_counts=True)
        target = self.target if self.target is not None else round((self.fraction or 1.0) * len(cluster))
        kept = quotas(sizes.astype(np.int64), target)
        order = np.lexsort((id1, id0, coin, first, index))
        starts = np.cumsum(sizes) - sizes
        within = np.arange(len(order)) - starts[index[order]]
        keep = np.zeros(len(order), bool)
        keep[order] = within < kept[index[order]]
        ends = np.cumsum([0, *(partial.num_rows for partial in tables)])
        return [
            pa.table([keep[start : start + partial.num_rows]], schema=REDUCED)
            for start, partial in zip(ends, tables, strict=False)
        ]

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        kept = reduced["kept"].to_numpy(zero_copy_only=False)
        return Output(drop=reasons(len(rows), {"cluster_over_cap": ~kept}))
