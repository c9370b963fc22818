"""Images by size and shape, from the sizes in their headers: no pixel is decoded."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.stages.base import Output, Rows, RowStage, reasons
from pipelines.stages.registry import STAGES


@STAGES.register(
    "image_size",
    "Drop images whose short side is too small or whose aspect ratio is too long",
    "DataComp: In search of the next generation of multimodal datasets",
)
class ImageSize(RowStage):
    """DataComp's basic filter: short side at least 200 pixels, aspect ratio at most 3."""

    kinds: ClassVar[tuple[Kind, ...]] = ("image-text",)
    drops: ClassVar[bool] = True

    min_side: int = Field(1, ge=1, description="pixels of the short side")
    max_side: int | None = Field(None, ge=1, description="pixels of the long side")
    max_aspect: float | None = Field(None, ge=1, description="long side / short side")

    def needs(self, kind: Kind) -> list[str]:
        return ["width", "height"]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field("aspect", pa.float32())]

    def run(self, rows: Rows) -> Output:
        width, height = rows.numbers("width"), rows.numbers("height")
        short, long = np.minimum(width, height), np.maximum(width, height)
        aspect = long / np.maximum(short, 1)
        masks = {"image_too_small": short < self.min_side}
        if self.max_side is not None:
            masks["image_too_large"] = long > self.max_side
        if self.max_aspect is not None:
            masks["aspect_too_long"] = aspect > self.max_aspect
        return Output({"aspect": aspect.astype(np.float32)}, reasons(len(rows), masks))
