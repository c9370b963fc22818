"""Text pairs whose sides are of very different length, as misaligned translations and wrong answers are.

The ratio is that of the longer to the shorter side in characters, spaces aside, with `slack` added to both so that
short texts are free to differ (the length filter of parallel corpora, Gale and Church 1993, "A Program for Aligning
Sentences in Bilingual Corpora", in its simplest form).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.stages.base import Output, Rows, RowStage, reasons
from pipelines.stages.registry import STAGES


@STAGES.register(
    "length_ratio",
    "Drop text pairs of which one side is much longer than the other",
    "A Program for Aligning Sentences in Bilingual Corpora",
)
class LengthRatio(RowStage):
    """`length_ratio` is at least 1; `positive_longer` tells which side a limit is for."""

    drops: ClassVar[bool] = True
    kinds: ClassVar[tuple[Kind, ...]] = ("text-text",)

    max_ratio: float = Field(3.0, ge=1, description="longer to shorter side from which a pair is dropped")
    max_positive: float | None = Field(
        None, ge=1, description="the same where the positive is longer (documents to queries); None: max_ratio"
    )
    slack: float = Field(15.0, ge=0, description="characters added to both sides before the division")

    def needs(self, kind: Kind) -> list[str]:
        return ["anchor", "positive"]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field("length_ratio", pa.float32())]

    def run(self, rows: Rows) -> Output:
        left, right = (_characters(rows.strings(name)) + self.slack for name in ("anchor", "positive"))
        ratio = np.maximum(left, right) / np.maximum(np.minimum(left, right), 1)
        limit = np.where(right > left, self.max_positive or self.max_ratio, self.max_ratio)
        return Output({"length_ratio": ratio.astype(np.float32)}, reasons(len(rows), {"length_ratio": ratio > limit}))


def _characters(texts: pa.StringArray) -> np.ndarray:
    """float64 [n]: characters that are not white space."""
    return pl.Series(texts).str.replace_all(r"\s+", "").str.len_chars().to_numpy().astype(np.float64)
