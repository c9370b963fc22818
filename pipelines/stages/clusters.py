"""k-means over embeddings that no machine could hold: each row gets its nearest centroid and the distance to it.

    draw     groups      the rows with the smallest keyed hashes, `points` a cluster, are sent to one task ...
    seed     partitions  ... which finds first centroids on them: k-means++ and `iterations` rounds of Lloyd
    assign   groups      sums of the rows nearest to each centroid, a group of neighbouring fragments after the other,
    update   partitions  and the new centroids from them; `full` times over the whole corpus

Sums are float64 and added in the order of the fragments, empty clusters are filled by a rule, and the sample does not
depend on how the corpus is cut: so neither the number of workers nor that of tasks changes a bit.

A sample of 256 points a cluster gives nearly the clusters of the whole (`python -m tests.benchmarks.bench_clusters`);
rounds over the whole corpus bring the rest where the sample is small beside it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import VIEWS, Kind
from cl.errors import DataError
from pipelines.keyed import id_words, keyed_hash
from pipelines.kmeans import assign, centres, cluster_sums, faiss_threads, fill_empty, kmeans, seeds
from pipelines.shuffle import Routed, to_everyone
from pipelines.stages.base import Output, Rows, vectors, whole
from pipelines.stages.keyed import Inbox, KeyedStage, Round, Streams
from pipelines.stages.registry import STAGES

SIZES = pa.schema([("rows", pa.int64())])
READ = 65_536  # rows of a fragment that are turned into float32 at a time
SEED_POINTS = 16  # of the sample, a cluster, that k-means++ chooses from


def vector_list(values: np.ndarray) -> pa.FixedSizeListArray:
    """[n, D] as a fixed-size list array of its own type."""
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed-size list column as [n, D] of its own type."""
    array = whole(column)
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False).reshape(-1, array.type.list_size))


@STAGES.register(
    "clusters",
    "k-means over embeddings: a cluster and the distance to its centre for every row",
    "Automatic Data Curation for Self-Supervised Learning: A Clustering-Based Approach",
)
class Clusters(KeyedStage):
    """A task holds the centroids and one fragment's embeddings; the one that seeds holds `points` rows a cluster."""

    version: ClassVar[int] = 2
    seeded: ClassVar[bool] = True
    frozen: ClassVar[Literal["statistics"]] = "statistics"
    sends: ClassVar[tuple[str, ...]] = ("sizes",)
    last: ClassVar[str] = "centroids"  # the stream with the centroids after all rounds over the corpus
    result: ClassVar[str] = "centroids"

    count: int = Field(100, ge=1, description="clusters; not more than there are rows")
    column: str | None = Field(None, description="embedding; None: image_embedding, or anchor_embedding of text pairs")
    iterations: int = Field(20, ge=1, description="rounds of k-means on the sample")
    points: int = Field(256, ge=1, description="rows a cluster of the sample that the first centroids come from")
    full: int = Field(0, ge=0, description="rounds of k-means over the whole corpus after those on the sample")
    spherical: bool = Field(True, description="centroids of length 1 and cosine; else Euclidean distance")
    threads: int = Field(1, ge=1, description="CPU threads; part of the result's last bits")

    def embedding(self, kind: Kind) -> str:
        """The column that is clustered."""
        return self.column or f"{next(iter(VIEWS[kind]))}_embedding"

    def needs(self, kind: Kind) -> list[str]:
        return [self.embedding(kind)]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field("cluster", pa.int32()), pa.field("cluster_distance", pa.float32())]

    def partial(self, rows: Rows, partitions: int) -> Streams:
        return {"sizes": to_everyone(pa.table([[len(rows)]], schema=SIZES))}

    def centroids_stream(self, number: int) -> str:
        """The stream with the centroids after so many rounds over the corpus."""
        return self.last if number == self.full else f"centroids-{number}"

    def rounds(self) -> list[Round]:
        out = [
            Round("draw", "groups", ("sizes",), ("sample",), self._draw),
            Round("seed", "partitions", ("sample",), (self.centroids_stream(0),), self._seed),
        ]
        for number in range(self.full):
            before, after, sums = self.centroids_stream(number), self.centroids_stream(number + 1), f"sums-{number}"
            out += [
                Round(f"assign {number}", "groups", (before,), (sums,), partial(self._assign, before, sums)),
                Round(f"update {number}", "partitions", (sums,), (after,), partial(self._update, sums, after)),
            ]
        return out

    def _draw(self, inbox: Inbox) -> Streams:
        total = int(inbox.streams["sizes"]["rows"].to_numpy().sum())
        wanted = self.count * self.points
        # Of n uniform hashes the `wanted` smallest lie below this but once in 10^9 samples.
        share = min((wanted + 6 * wanted**0.5 + 36) / max(total, 1), 1.0)
        limit = np.uint64(min(share * 2.0**64, 2.0**64 - 2**11))
        tables = []
        for fragment in inbox.fragments:
            ids = inbox.columns.read(fragment, "id").to_pylist()
            coin = keyed_hash(inbox.seed, ids, "clusters")
            taken = np.flatnonzero(coin <= limit) if share < 1 else np.arange(len(ids))
            words = id_words([ids[row] for row in taken.tolist()])
            point = inbox.columns.read(fragment, self.embedding(inbox.kind)).take(pa.array(taken))
            columns = [pa.array(coin[taken]), pa.array(words[:, 0]), pa.array(words[:, 1]), point]
            tables.append(pa.table(columns, names=["coin", "id0", "id1", "point"]))
        sample = pa.concat_tables(tables)
        return {"sample": Routed(sample, np.zeros(sample.num_rows, np.int64))}

    def _seed(self, inbox: Inbox) -> Streams:
        table = inbox.streams["sample"]
        if inbox.task:
            none = np.zeros((0, table["point"].type.list_size), np.float32)
            return {self.centroids_stream(0): to_everyone(centroid_table(np.zeros(0, int), np.zeros(0, int), none))}
        if table.num_rows < self.count:
            raise DataError(
                f"Stage {self.name!r} is to find {self.count} clusters, but only {table.num_rows} rows are left."
            )
        coin, id0, id1 = (table[name].to_numpy() for name in ("coin", "id0", "id1"))
        order = np.lexsort((id1, id0, coin))[: self.count * self.points]
        points = vectors(table["point"].take(pa.array(order)))
        rng = np.random.default_rng([inbox.seed % (1 << 63), self.count])
        with faiss_threads(self.threads):
            start = seeds(points[: max(SEED_POINTS * self.count, 1)], self.count, rng)
            centroids, sizes = kmeans(points, start, self.iterations, self.spherical)
        found = np.arange(self.count)
        return {self.centroids_stream(0): to_everyone(centroid_table(found, np.maximum(sizes, 1), centroids))}

    def read_centroids(self, table: pa.Table) -> np.ndarray:
        """float32 [count, D]: the centroids of a stream; those of clusters without rows are put beside others."""
        width = table["centroid"].type.list_size
        centroids, sizes = np.zeros((self.count, width), np.float32), np.zeros(self.count, np.int64)
        cluster = table["cluster"].to_numpy()
        centroids[cluster] = matrix(table["centroid"])
        sizes[cluster] = table["size"].to_numpy()
        return fill_empty(centroids, sizes, self.spherical)

    def _assign(self, before: str, sums: str, inbox: Inbox) -> Streams:
        centroids = self.read_centroids(inbox.streams[before])
        total = np.zeros(centroids.shape)  # float64
        sizes = np.zeros(self.count, np.int64)
        with faiss_threads(self.threads):
            for fragment in inbox.fragments:
                column = inbox.columns.read(fragment, self.embedding(inbox.kind))
                for start in range(0, len(column), READ):
                    points = vectors(column.slice(start, READ))
                    cluster, _ = assign(points, centroids, self.spherical)
                    found, counts, part = cluster_sums(points, cluster)
                    total[found] += part
                    sizes[found] += counts
        found = np.flatnonzero(sizes)
        table = pa.table({"cluster": found, "size": sizes[found], "sum": vector_list(total[found])})
        return {sums: Routed(table, found % inbox.partitions)}

    def _update(self, sums: str, after: str, inbox: Inbox) -> Streams:
        table = inbox.streams[sums]  # in the order of the groups
        cluster, place = np.unique(table["cluster"].to_numpy(), return_inverse=True)
        total = np.zeros((len(cluster), table["sum"].type.list_size))
        np.add.at(total, place, matrix(table["sum"]))
        sizes = np.zeros(len(cluster), np.int64)
        np.add.at(sizes, place, table["size"].to_numpy())
        return {after: to_everyone(centroid_table(cluster, sizes, centres(total, sizes, self.spherical)))}

    def assigned(self, rows: Rows, centroids: np.ndarray) -> dict[str, Any]:
        """The columns `cluster` and `cluster_distance` of rows."""
        column = rows.table[self.embedding(rows.corpus.kind)]
        cluster, distance = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        with faiss_threads(self.threads):
            for start in range(0, len(column), READ):
                part = assign(vectors(column.slice(start, READ)), centroids, self.spherical)
                cluster.append(part[0])
                distance.append(part[1])
        return {"cluster": np.concatenate(cluster), "cluster_distance": np.concatenate(distance)}

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        return Output(self.assigned(rows, self.read_centroids(reduced)))


def centroid_table(cluster: np.ndarray, sizes: np.ndarray, centroids: np.ndarray) -> pa.Table:
    """What a stream of centroids holds: number, size and centroid, float32 [c, D]."""
    columns = [pa.array(cluster, pa.int64()), pa.array(sizes, pa.int64()), vector_list(centroids)]
    return pa.table(columns, names=["cluster", "size", "centroid"])
