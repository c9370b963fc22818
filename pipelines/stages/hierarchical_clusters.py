"""Clusters of clusters: k-means whose centroids are clustered again, so that they spread evenly over what there is.

Vo et al. 2024, "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach": the centroids of
k-means follow the density of the data; those of k-means on centroids lie more evenly, and more so on each level. Above
the first level the centroids are computed again from the r points nearest to each (resampling), several times:

    level 1    k-means over the corpus (`pipelines.stages.clusters`)
    level t    k-means on the centroids of level t - 1; then `resample` times: of every cluster the `nearest` points
               alone, k-means on those, all points assigned to the new centroids

The paper's web-scale setting is 4 levels of 10M, 500k, 50k and 10k clusters, 50 iterations, 10 resamplings of 10, 5 and
3 points.
"""

from __future__ import annotations

import itertools
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from cl.corpus import Kind
from pipelines.kmeans import assign, faiss_threads, kmeans, seeds
from pipelines.shuffle import to_everyone
from pipelines.stages.base import Output, Rows
from pipelines.stages.clusters import Clusters, centroid_table
from pipelines.stages.keyed import Inbox, Round, Streams
from pipelines.stages.registry import STAGES


def level_column(level: int) -> str:
    """The column with the clusters of a level; level 1 is the finest."""
    return "cluster" if level == 1 else f"cluster_level_{level}"


def nearest_of_each(cluster: np.ndarray, distance: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` points nearest to each centroid stand (ties: the first), int64 [m] ascending."""
    order = np.lexsort((np.arange(len(cluster)), distance, cluster))
    sizes = np.bincount(cluster)
    within = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[cluster[order]]
    return np.sort(order[within < count])


def resampled(
    points: np.ndarray, count: int, iterations: int, rounds: int, nearest: int, spherical: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """k-means with resampling: the cluster of each of float32 [n, D], int32 [n], and the centroids, [count, D]."""
    rng = np.random.default_rng([seed % (1 << 63), count])
    centroids, _ = kmeans(points, seeds(points, count, rng), iterations, spherical)
    for _ in range(rounds):
        taken = points[nearest_of_each(*assign(points, centroids, spherical), nearest)]
        if len(taken) < count:
            break  # hardly more points than clusters: some have none
        centroids, _ = kmeans(taken, seeds(taken, count, rng), iterations, spherical)
    return assign(points, centroids, spherical)[0], centroids


@STAGES.register(
    "hierarchical_clusters",
    "k-means of several levels with resampling: a cluster of each level for every row",
    "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach",
)
class HierarchicalClusters(Clusters):
    """Writes `cluster`, `cluster_level_2` and so on. One task finds the levels above the first, and holds the `count`
    centroids of the first.
    """

    last: ClassVar[str] = "flat"

    levels: tuple[int, ...] = Field(description="clusters of level 2, 3 and so on, fewer each; `count` is of level 1")
    resample: int = Field(10, ge=0, description="resamplings of each level above the first")
    nearest: tuple[int, ...] | int = Field(
        5, description="points of a cluster in a resampling; one for all, or by level"
    )

    @model_validator(mode="after")
    def _fewer_each(self) -> Self:
        sizes = (self.count, *self.levels)
        if not self.levels or any(above < 1 or above >= below for below, above in itertools.pairwise(sizes)):
            raise ValueError(f"levels must have fewer clusters each, beginning below count ({self.count})")
        if any(each < 1 for each in self._nearest()) or len(self._nearest()) != len(self.levels):
            raise ValueError(f"nearest must be one number for each of the {len(self.levels)} levels, or one for all")
        return self

    def _nearest(self) -> tuple[int, ...]:
        return self.nearest if isinstance(self.nearest, tuple) else (self.nearest,) * len(self.levels)

    def makes(self, kind: Kind) -> list[pa.Field]:
        above = range(2, len(self.levels) + 2)
        return [*super().makes(kind), *(pa.field(level_column(level), pa.int32()) for level in above)]

    def rounds(self) -> list[Round]:
        return [*super().rounds(), Round("levels", "partitions", (self.last,), (self.result,), self._levels)]

    def _levels(self, inbox: Inbox) -> Streams:
        flat = inbox.streams[self.last]
        centroids = self.read_centroids(flat)
        table = centroid_table(np.arange(self.count), np.ones(self.count, np.int64), centroids)
        path = np.arange(self.count)
        points = centroids
        for level, (count, nearest) in enumerate(zip(self.levels, self._nearest(), strict=True), start=2):
            if inbox.task == 0:
                with faiss_threads(self.threads):
                    cluster, points = resampled(
                        points, count, self.iterations, self.resample, nearest, self.spherical, inbox.seed
                    )
                path = cluster[path].astype(np.int64)
            table = table.append_column(level_column(level), pa.array(path, pa.int32()))
        return {self.result: to_everyone(table if inbox.task == 0 else table.slice(0, 0))}

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        table = reduced.sort_by("cluster")
        columns = self.assigned(rows, self.read_centroids(table))
        of = columns["cluster"]
        for level in range(2, len(self.levels) + 2):
            columns[level_column(level)] = table[level_column(level)].to_numpy()[of]
        return Output(columns)
