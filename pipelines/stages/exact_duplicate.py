"""Samples with equal content: one of each group stays.

Content is the encoded image, or both texts of a pair without regard to case and white space (`cl.corpus`). Kept is the
first in the order of the corpus, or the one with the highest value of a column; ties go to the smaller id.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.keyed import id_text, id_words
from pipelines.stages.base import Context, GlobalStage, Output, Rows, internal, reasons
from pipelines.stages.registry import STAGES

_ID = [("content0", pa.uint64()), ("content1", pa.uint64()), ("id0", pa.uint64()), ("id1", pa.uint64())]
PARTIAL = pa.schema([*_ID, ("score", pa.float64())])
REDUCED = pa.schema([("row", pa.int32()), ("kept", pa.string())])


@STAGES.register("exact_duplicate", "Drop all but one of the samples with equal content")
class ExactDuplicate(GlobalStage):
    """The reduction holds 40 bytes a living row."""

    drops: ClassVar[bool] = True

    best: str | None = Field(None, description="numeric column whose highest value is kept; None keeps the first")

    def needs(self, kind: Kind) -> list[str]:
        return ["content"] + ([self.best] if self.best else [])

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [internal("exact_duplicate_of", pa.string())]

    def partial(self, rows: Rows) -> pa.Table:
        content = id_words(rows.table["content"].to_pylist())
        ids = id_words(rows.table["id"].to_pylist())
        score = np.nan_to_num(rows.numbers(self.best), nan=-np.inf) if self.best else np.zeros(len(rows))
        columns = [content[:, 0], content[:, 1], ids[:, 0], ids[:, 1], score]
        return pa.table([pa.array(values) for values in columns], schema=PARTIAL)

    def reduce(self, partials: list[pa.Table], context: Context) -> list[pa.Table]:
        table = pa.concat_tables(partials)
        c0, c1, i0, i1, score = (table[name].to_numpy() for name in PARTIAL.names)
        # Ascending by content, then the one to keep first; the sort is stable, so equal keys keep the corpus order.
        keys = (i1, i0, -score, c1, c0) if self.best else (c1, c0)
        order = np.lexsort(keys)
        first = np.ones(len(order), bool)
        first[1:] = (np.diff(c0[order]) != 0) | (np.diff(c1[order]) != 0)
        kept = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]  # of each row in sorted order
        keeper = np.empty(len(order), np.int64)
        keeper[order] = kept
        out, start = [], 0
        ids = np.stack([i0, i1], 1) if len(order) else np.zeros((0, 2), np.uint64)
        for partial in partials:
            mine = keeper[start : start + partial.num_rows]
            rows = np.flatnonzero(mine != np.arange(start, start + partial.num_rows))
            kept_ids = id_text(ids[mine[rows]])
            out.append(pa.table([pa.array(rows, pa.int32()), pa.array(kept_ids, pa.string())], schema=REDUCED))
            start += partial.num_rows
        return out

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        return duplicates(len(rows), reduced, "exact_duplicate_of", "exact_duplicate")


def duplicates(rows: int, reduced: pa.Table, column: str, reason: str) -> Output:
    """The output of a stage whose reduction lists the dropped rows (`row`) with the id that was kept (`kept`)."""
    dropped = np.zeros(rows, bool)
    kept = np.full(rows, None, dtype=object)
    positions = reduced["row"].to_numpy()
    dropped[positions] = True
    kept[positions] = reduced["kept"].to_pylist()
    return Output({column: kept}, reasons(rows, {reason: dropped}))
