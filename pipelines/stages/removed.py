"""Samples that `clew remove` took out of a curation's output, so that no run with another config brings them back."""

from __future__ import annotations

from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from cl.corpus import Kind
from cl.tombstones import read_tombstones, tombstones_digest
from pipelines.stages.base import Output, Rows, RowStage, reasons


class Removed(RowStage):
    """Put first by `clew curate` where its output has tombstones; a task holds their ids."""

    name: ClassVar[str] = "remove"
    drops: ClassVar[bool] = True
    unkeyed: ClassVar[frozenset[str]] = frozenset({"root"})  # the digest stands for the ids

    root: str

    def digest(self) -> str:
        return tombstones_digest(self.root)

    def needs(self, kind: Kind) -> list[str]:
        return ["id"]

    def run(self, rows: Rows) -> Output:
        gone = pc.is_in(rows.table["id"], pa.array(read_tombstones(self.root), pa.string()))
        return Output(drop=reasons(len(rows), {"removed": gone.to_numpy()}))
