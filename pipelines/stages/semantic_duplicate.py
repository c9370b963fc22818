"""Rows of a cluster whose embeddings are nearly the same: SemDeDup (Abbas et al. 2023).

Within each cluster rows are taken from the farthest to the centre to the nearest (or in another order), ties by id. A
row whose cosine to an earlier one exceeds 1 - epsilon is dropped. The paper compares with every earlier row, dropped
ones included, so that chains of likenesses can empty a region; the default here compares with kept rows alone.
"""

from __future__ import annotations

import itertools
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import VIEWS, Kind
from pipelines.keyed import id_words, keyed_hash, mix
from pipelines.shuffle import Routed
from pipelines.stages.base import Output, Rows, internal, vectors
from pipelines.stages.exact_duplicate import duplicates, verdicts
from pipelines.stages.keyed import Inbox, KeyedStage, Round, Streams, references
from pipelines.stages.registry import STAGES

ROWS = pa.schema([("cluster", pa.int64()), ("distance", pa.float64()), ("ref", pa.int64()),
                  ("id0", pa.uint64()), ("id1", pa.uint64())])  # fmt: skip
BLOCK = 1024  # rows compared at a time


def greedy_duplicates(points: np.ndarray, threshold: float, kept_only: bool = True, standing: int = 0) -> np.ndarray:
    """For each row of float32 [n, D] in its order: the earlier row that it duplicates, or -1; int64 [n].

    A row duplicates the first earlier one (kept one, if `kept_only`) whose cosine with it exceeds the threshold. The
    first `standing` rows are no duplicates.
    """
    of = np.full(len(points), -1, np.int64)
    for start in range(0, len(points), BLOCK):
        block = points[start : start + BLOCK]
        before = np.flatnonzero(of[:start] < 0) if kept_only else np.arange(start)
        if len(before):
            near = block @ points[before].T > threshold
            of[start : start + len(block)] = np.where(near.any(1), before[near.argmax(1)], -1)
            of[:standing] = -1
        within = block @ block.T > threshold
        for row in range(max(standing - start, 1), len(block)):
            if of[start + row] >= 0:
                continue
            earlier = within[row, :row] & (of[start : start + row] < 0) if kept_only else within[row, :row]
            if earlier.any():
                of[start + row] = start + int(earlier.argmax())
    return of


@STAGES.register(
    "semantic_duplicate",
    "Drop rows whose embedding nearly equals that of a kept row of the same cluster",
    "SemDeDup: Data-efficient learning at web-scale through semantic deduplication",
)
class SemanticDuplicate(KeyedStage):
    """A task holds the embeddings of its partition, which is the cluster's, in float16."""

    version: ClassVar[int] = 2
    drops: ClassVar[bool] = True
    seeded: ClassVar[bool] = True
    frozen: ClassVar[Literal["rows"]] = "rows"
    sends: ClassVar[tuple[str, ...]] = ("rows",)

    epsilon: float = Field(0.05, ge=0, le=2, description="1 - cosine below which two rows are duplicates")
    column: str | None = Field(None, description="embedding; None: image_embedding, or anchor_embedding of text pairs")
    first: Literal["farthest", "closest", "random"] = Field(
        "farthest", description="which rows of a cluster come first, and stay"
    )
    best: str | None = Field(None, description="numeric column whose highest value comes first, in place of `first`")
    compare: Literal["kept", "all"] = Field(
        "kept", description="with kept rows alone, or with all earlier ones (paper)"
    )

    def _column(self, kind: Kind) -> str:
        return self.column or f"{next(iter(VIEWS[kind]))}_embedding"

    def needs(self, kind: Kind) -> list[str]:
        return [self._column(kind), "cluster", "cluster_distance", *([self.best] if self.best else [])]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [internal("semantic_duplicate_of", pa.string())]

    def partial(self, rows: Rows, partitions: int) -> Streams:
        ids = rows.table["id"].to_pylist()
        words = id_words(ids)
        cluster = rows.table["cluster"].cast(pa.int64()).to_numpy()
        if rows.standing:
            first = np.full(len(rows), -np.inf)
        elif self.best:
            first = -np.nan_to_num(rows.numbers(self.best), nan=-np.inf)
        elif self.first == "random":
            first = keyed_hash(rows.seed, ids, "semantic_duplicate").astype(np.float64)
        else:
            distance = rows.numbers("cluster_distance")
            first = -distance if self.first == "farthest" else distance
        table = pa.table([cluster, first, references(rows), words[:, 0], words[:, 1]], schema=ROWS)
        point = rows.table[self._column(rows.corpus.kind)].combine_chunks()
        to = mix(cluster.astype(np.uint64)) % np.uint64(partitions)
        return {"rows": Routed(table.append_column("point", point), to.astype(np.int64))}

    def rounds(self) -> list[Round]:
        return [Round("compare", "partitions", ("rows",), ("verdicts",), self._compare)]

    def _compare(self, inbox: Inbox) -> Streams:
        table = inbox.streams["rows"]
        cluster, first, ref, id0, id1 = (table[name].to_numpy() for name in ROWS.names)
        order = np.lexsort((ref, id1, id0, first, cluster))
        of = np.full(len(order), -1, np.int64)
        bounds = np.flatnonzero(np.diff(cluster[order], prepend=-1, append=-1)) if len(order) else np.zeros(0, int)
        for start, end in itertools.pairwise(bounds.tolist()):
            rows = order[start:end]
            points = vectors(table["point"].take(pa.array(rows)))
            standing = int(inbox.standing(ref[rows]).sum())
            found = greedy_duplicates(points, 1 - self.epsilon, self.compare == "kept", standing)
            hit = found >= 0
            of[rows[hit]] = rows[found[hit]]
        dropped = np.flatnonzero(of >= 0)
        return {"verdicts": verdicts(ref[dropped], id0[of[dropped]], id1[of[dropped]])}

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        return duplicates(len(rows), reduced, "semantic_duplicate_of", "semantic_duplicate")
