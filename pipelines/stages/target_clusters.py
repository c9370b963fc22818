"""Clusters that a target set falls into: keep what lies near samples of the kind that a model is wanted for.

Gadre et al. 2023, "DataComp: In search of the next generation of multimodal datasets" (image-based filtering): the
pool's embeddings are clustered (100,000 clusters), each target sample (ImageNet's training images) is assigned to its
nearest centroid, and the clusters stay to which at least one was.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from cl import storage
from cl.corpus import Kind
from cl.errors import DataError
from pipelines.kmeans import assign, faiss_threads
from pipelines.paths import absolute
from pipelines.shuffle import Routed, to_everyone
from pipelines.stages.base import Output, Rows, Stage, reasons, vectors
from pipelines.stages.clusters import Clusters
from pipelines.stages.decontaminate import embeddings_digest
from pipelines.stages.keyed import Inbox, Round, Streams
from pipelines.stages.registry import STAGES

HITS = pa.schema([("cluster", pa.int64()), ("targets", pa.int64())])


@STAGES.register(
    "target_clusters",
    "k-means over embeddings; keep the clusters to which some embedding of a target set is nearest",
    "DataComp: In search of the next generation of multimodal datasets",
)
class TargetClusters(Clusters):
    """Writes `cluster`, `cluster_distance` and `cluster_targets`, the target samples in the cluster of a row.

    `against` are outputs of `clew embed` by the model of the stage `embedding`; a task holds one file of them.
    """

    drops: ClassVar[bool] = True
    unkeyed: ClassVar[frozenset[str]] = frozenset({"against"})  # the digest stands for what they hold
    last: ClassVar[str] = "flat"

    against: tuple[str, ...] = Field(description="embeddings of the target set: folders or URLs that clew embed wrote")
    min_targets: int = Field(1, ge=0, description="target samples that a cluster must have to stay; 0 keeps every row")

    @field_validator("against")
    @classmethod
    def _some(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("give at least one output of `clew embed`")
        return value

    def resolve(self, model: str | None, kind: Kind) -> Stage:
        return self.model_copy(update={"against": tuple(map(absolute, self.against))})

    def digest(self) -> str:
        return embeddings_digest(self.name, self.against)

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [*super().makes(kind), pa.field("cluster_targets", pa.int32())]

    def rounds(self) -> list[Round]:
        return [
            *super().rounds(),
            Round("hit", "partitions", (self.last,), ("hits",), self._hit),
            Round("join", "partitions", (self.last, "hits"), (self.result,), self._join),
        ]

    def _hit(self, inbox: Inbox) -> Streams:
        """The target samples in each cluster, of this task's share of the files."""
        centroids = self.read_centroids(inbox.streams[self.last])
        files = [storage.join(path, name) for path in self.against for name in storage.list_files(path, ".parquet")]
        column = self.embedding(inbox.kind)
        targets = np.zeros(self.count, np.int64)
        with faiss_threads(self.threads):
            for url in files[inbox.task :: inbox.partitions]:
                points = vectors(storage.read_table(url, [column])[column])
                if points.shape[1] != centroids.shape[1]:
                    raise DataError(
                        f"Stage {self.name!r}: the embeddings of {url} have {points.shape[1]} dimensions, those of the "
                        f"corpus {centroids.shape[1]}: both must be by the same model."
                    )
                targets += np.bincount(assign(points, centroids, self.spherical)[0], minlength=self.count)
        found = np.flatnonzero(targets)
        return {"hits": Routed(pa.table([found, targets[found]], schema=HITS), np.zeros(len(found), np.int64))}

    def _join(self, inbox: Inbox) -> Streams:
        flat = inbox.streams[self.last].sort_by("cluster")
        hits = inbox.streams["hits"]
        targets = np.zeros(self.count, np.int64)
        np.add.at(targets, hits["cluster"].to_numpy(), hits["targets"].to_numpy())
        table = flat.append_column("targets", pa.array(targets[flat["cluster"].to_numpy()], pa.int32()))
        return {self.result: to_everyone(table if inbox.task == 0 else table.slice(0, 0))}

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        columns = self.assigned(rows, self.read_centroids(reduced))
        targets = np.zeros(self.count, np.int32)
        targets[reduced["cluster"].to_numpy()] = reduced["targets"].to_numpy()
        mine = targets[columns["cluster"]]
        columns["cluster_targets"] = mine
        return Output(columns, reasons(len(rows), {"off_target": mine < self.min_targets}))
