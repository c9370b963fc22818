"""Samples with equal content: one of each group stays.

Content is the encoded image, or both texts of a pair without regard to case and white space (`cl.corpus`). Kept is the
first in the order of the corpus, or the one with the highest value of a column; ties go to the smaller id.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.keyed import id_text, id_words
from pipelines.shuffle import Routed
from pipelines.stages.base import Output, Rows, internal, reasons
from pipelines.stages.keyed import Inbox, KeyedStage, Round, Streams, fragment_of, place_of, references
from pipelines.stages.registry import STAGES

WHO = [("ref", pa.int64()), ("rank", pa.float64()), ("id0", pa.uint64()), ("id1", pa.uint64())]
ROWS = pa.schema([("content0", pa.uint64()), ("content1", pa.uint64()), *WHO])
VERDICTS = pa.schema([("row", pa.int32()), ("id0", pa.uint64()), ("id1", pa.uint64())])


@STAGES.register("exact_duplicate", "Drop all but one of the samples with equal content")
class ExactDuplicate(KeyedStage):
    """A task holds 48 bytes a row of its partition, which is the content's."""

    version: ClassVar[int] = 2
    drops: ClassVar[bool] = True
    frozen: ClassVar[Literal["rows"]] = "rows"
    sends: ClassVar[tuple[str, ...]] = ("rows",)

    best: str | None = Field(None, description="numeric column whose highest value is kept; None keeps the first")

    def needs(self, kind: Kind) -> list[str]:
        return ["content"] + ([self.best] if self.best else [])

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [internal("exact_duplicate_of", pa.string())]

    def partial(self, rows: Rows, partitions: int) -> Streams:
        content = id_words(rows.table["content"].to_pylist())
        ids = id_words(rows.table["id"].to_pylist())
        refs = references(rows)
        rank = -np.nan_to_num(rows.numbers(self.best), nan=-np.inf) if self.best else refs.astype(np.float64)
        if rows.standing:
            rank = np.full(len(rows), -np.inf)
        table = pa.table([content[:, 0], content[:, 1], refs, rank, ids[:, 0], ids[:, 1]], schema=ROWS)
        return {"rows": Routed(table, (content[:, 0] % np.uint64(partitions)).astype(np.int64))}

    def rounds(self) -> list[Round]:
        return [Round("choose", "partitions", ("rows",), ("verdicts",), self._choose)]

    def _choose(self, inbox: Inbox) -> Streams:
        c0, c1, ref, rank, i0, i1 = (column.to_numpy() for column in inbox.streams["rows"].columns)
        order = np.lexsort((ref, i1, i0, rank, c1, c0))
        first = np.ones(len(order), bool)
        first[1:] = (np.diff(c0[order]) != 0) | (np.diff(c1[order]) != 0)
        kept = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]  # of each row in sorted order
        return {"verdicts": verdicts(ref[order[~first]], i0[kept[~first]], i1[kept[~first]])}

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        return duplicates(len(rows), reduced, "exact_duplicate_of", "exact_duplicate")


def verdicts(dropped: np.ndarray, id0: np.ndarray, id1: np.ndarray) -> Routed:
    """What tells fragments which of their rows (references) are dropped, and the ids of those that are kept instead."""
    return Routed(pa.table([place_of(dropped), id0, id1], schema=VERDICTS), fragment_of(dropped))


def duplicates(rows: int, reduced: pa.Table, column: str, reason: str) -> Output:
    """The output of a stage from its `verdicts`."""
    dropped = np.zeros(rows, bool)
    kept = np.full(rows, None, dtype=object)
    positions = reduced["row"].to_numpy()
    dropped[positions] = True
    kept[positions] = id_text(np.stack([reduced["id0"].to_numpy(), reduced["id1"].to_numpy()], 1))
    return Output({column: kept}, reasons(rows, {reason: dropped}))
