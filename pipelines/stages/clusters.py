"""Spherical k-means over embeddings: each row gets its nearest centroid and the distance to it.

The centroids come from faiss on a keyed sample of the rows (its own practice: some hundreds of points a centroid), in
keyed order, so neither order nor workers matter. Every row of the corpus is then assigned, fragment by fragment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import VIEWS, Kind
from cl.errors import DataError
from pipelines.keyed import id_words, keyed_hash
from pipelines.stages.base import Context, GlobalStage, Output, Rows, vectors
from pipelines.stages.registry import STAGES

PARTIAL = pa.schema([("coin", pa.uint64()), ("id0", pa.uint64()), ("id1", pa.uint64())])


def train_centroids(points: np.ndarray, count: int, iterations: int, seed: int, threads: int) -> np.ndarray:
    """Centroids of length 1, float32 [count, D], of float32 [n, D]; the same for the same points in the same order."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        kmeans = faiss.Kmeans(
            points.shape[1],
            count,
            niter=iterations,
            seed=seed % (1 << 31),
            spherical=True,
            min_points_per_centroid=1,
            max_points_per_centroid=max(-(-len(points) // count), 1),
        )
        kmeans.train(np.ascontiguousarray(points, np.float32))
    finally:
        faiss.omp_set_num_threads(before)
    return np.asarray(kmeans.centroids, np.float32)


def assign(points: np.ndarray, centroids: np.ndarray, block: int = 8192) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid by cosine (ties: the lower number), int32 [n], and 1 - cosine, float32 [n]."""
    cluster = np.zeros(len(points), np.int32)
    distance = np.zeros(len(points), np.float32)
    for start in range(0, len(points), block):
        cosine = points[start : start + block] @ centroids.T
        best = cosine.argmax(1)
        cluster[start : start + block] = best
        distance[start : start + block] = 1 - cosine[np.arange(len(best)), best]
    return cluster, distance


def _points(context: Context, column: str, rows: np.ndarray, sizes: list[int]) -> np.ndarray:
    """The embeddings of chosen rows in the given order, float32 [n, D], read fragment by fragment."""
    starts = np.cumsum([0, *sizes])
    parts, places = [], []
    for fragment in range(context.fragments):
        mine = np.flatnonzero((rows >= starts[fragment]) & (rows < starts[fragment + 1]))
        if len(mine):
            taken = context.columns.read(fragment, column).take(pa.array(rows[mine] - starts[fragment]))
            parts.append(vectors(taken))
            places.append(mine)
    out = np.empty((len(rows), parts[0].shape[1]), np.float32)
    out[np.concatenate(places)] = np.concatenate(parts)
    return out


@STAGES.register(
    "clusters",
    "Spherical k-means over embeddings: a cluster and the distance to its centre for every row",
    "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach",
)
class Clusters(GlobalStage):
    """The reduction holds 24 bytes a living row, `points` embeddings a cluster."""

    seeded: ClassVar[bool] = True

    count: int = Field(100, ge=1, description="clusters; not more than there are rows")
    column: str | None = Field(None, description="embedding; None: image_embedding, or anchor_embedding of text pairs")
    iterations: int = Field(20, ge=1, description="rounds of k-means")
    points: int = Field(256, ge=1, description="rows a cluster that the centroids are computed from")
    threads: int = Field(1, ge=1, description="CPU threads; part of the result's last bits")

    def _column(self, kind: Kind) -> str:
        return self.column or f"{next(iter(VIEWS[kind]))}_embedding"

    def needs(self, kind: Kind) -> list[str]:
        return [self._column(kind)]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field("cluster", pa.int32()), pa.field("cluster_distance", pa.float32())]

    def partial(self, rows: Rows) -> pa.Table:
        ids = rows.table["id"].to_pylist()
        words = id_words(ids)
        return pa.table([keyed_hash(rows.seed, ids, "clusters"), words[:, 0], words[:, 1]], schema=PARTIAL)

    def reduce(self, partials: Sequence[pa.Table], context: Context) -> pa.Table:
        tables = list(partials)
        table = pa.concat_tables(tables)
        if table.num_rows < self.count:
            raise DataError(
                f"Stage 'clusters' is to find {self.count} clusters, but only {table.num_rows} rows are left."
            )
        coin, id0, id1 = (table[name].to_numpy() for name in PARTIAL.names)
        order = np.lexsort((id1, id0, coin))[: self.count * self.points]
        points = _points(context, self._column(context.kind), order, [partial.num_rows for partial in tables])
        centroids = train_centroids(points, self.count, self.iterations, context.seed, self.threads)
        flat = pa.array(centroids.ravel(), pa.float32())
        return pa.table([pa.FixedSizeListArray.from_arrays(flat, centroids.shape[1])], names=["centroid"])

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        points = rows.vectors(self._column(rows.corpus.kind))
        cluster, distance = assign(points, vectors(reduced["centroid"]))
        return Output({"cluster": cluster, "cluster_distance": distance})
