"""Keep the samples that a DataComp subset file names, by the uid in their own metadata."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import numpy as np
from blake3 import blake3
from pydantic import Field

from cl.corpus import Kind
from pipelines.datacomp import meta_uids, read_subset
from pipelines.paths import absolute
from pipelines.stages.base import Output, Rows, RowStage, Stage, reasons
from pipelines.stages.registry import STAGES


@STAGES.register(
    "subset",
    "Keep the samples that a DataComp subset file (.npy of uids) names",
    "DataComp: In search of the next generation of multimodal datasets",
)
class Subset(RowStage):
    """A task holds the file, 16 bytes a uid."""

    drops: ClassVar[bool] = True
    unkeyed: ClassVar[frozenset[str]] = frozenset({"path"})  # the digest stands for its content

    path: str = Field(description="path or URL of the subset file")

    def resolve(self, model: str | None, kind: Kind) -> Stage:
        return self.model_copy(update={"path": absolute(self.path)})  # workers may have another working folder

    def digest(self) -> str:
        return blake3(read_subset(self.path).tobytes()).hexdigest(length=16)

    def needs(self, kind: Kind) -> list[str]:
        return ["meta"]

    def open(self) -> Callable[[Rows], Output]:
        return partial(self._keep, read_subset(self.path))

    def _keep(self, uids: np.ndarray, rows: Rows) -> Output:
        mine, has = meta_uids(rows.table["meta"], f"fragment {rows.fragment}")
        place = np.minimum(np.searchsorted(uids, mine), max(len(uids) - 1, 0))
        named = (uids[place] == mine) if len(uids) else np.zeros(len(mine), bool)
        return Output(drop=reasons(len(rows), {"no_uid": ~has, "not_in_subset": ~named}))
