"""Pictures that show nothing: blank, flat, blurred.

    sharpness   the variance of the Laplacian (four neighbours) of the grey image, levels 0 to 255: Pech-Pacheco et al.
                2000, "Diatom autofocusing in brightfield microscopy: a comparative study"
    entropy     of the grey levels, in bits: 0 of one level, 8 of all levels alike
    flat        the share of the most frequent colour, told apart by 32 levels a channel: placeholders, mats, scans

Sharpness is that of the picture at a short side of at most 128 pixels, so that it is comparable between pictures of any
size; what is blurred at that size is so at any size that models look at. It depends on what is shown (drawings have
hard edges, portraits few): look at the column before a threshold is set.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from cl.corpus import Kind
from pipelines.heavy import SHORT_SIDE
from pipelines.stages.base import Output, PixelStage, Rows, reasons
from pipelines.stages.perceptual_hash import GREY
from pipelines.stages.registry import STAGES

LEVELS = 32  # of a channel, for the most frequent colour


def image_quality(pixels: np.ndarray) -> tuple[float, float, float]:
    """Sharpness, entropy [bits] and flatness [0 to 1] of uint8 [H, W, 3]."""
    grey = pixels.astype(np.float32) @ GREY
    share = np.bincount(np.rint(grey).astype(np.int64).ravel()) / grey.size
    present = share[share > 0]
    colours = pixels.astype(np.int64) * LEVELS // 256 @ np.array([LEVELS * LEVELS, LEVELS, 1])
    height, width = grey.shape
    scale = SHORT_SIDE / min(height, width)
    if scale < 1:
        size = round(width * scale), round(height * scale)
        grey = np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR))
    edges = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    return (
        float(edges.var()) if edges.size else 0.0,
        float(-(present * np.log2(present)).sum()),
        float(np.bincount(colours.ravel()).max() / colours.size),
    )


@STAGES.register("image_quality", "Sharpness, entropy and flatness of pictures; drop those that show nothing")
class ImageQuality(PixelStage):
    """The defaults drop blank pictures alone."""

    drops: ClassVar[bool] = True

    min_sharpness: float = Field(0.0, ge=0, description="variance of the Laplacian; 0: any")
    min_entropy: float = Field(0.1, ge=0, le=8, description="bits of the grey levels")
    max_flat: float = Field(0.99, gt=0, le=1, description="share of the most frequent colour")

    def needs(self, kind: Kind) -> list[str]:
        return []

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field(f"image_{name}", pa.float32()) for name in ("sharpness", "entropy", "flat")]

    def measure(self, pixels: np.ndarray) -> Any:
        return image_quality(pixels)

    def finish(self, rows: Rows, measured: list[Any]) -> Output:
        sharpness, entropy, flat = np.array(measured, np.float32).reshape(-1, 3).T
        masks = {
            "flat": flat > self.max_flat,
            "low_entropy": entropy < self.min_entropy,
            "blurred": sharpness < self.min_sharpness,
        }
        columns = {"image_sharpness": sharpness, "image_entropy": entropy, "image_flat": flat}
        return Output(columns, reasons(len(rows), masks))
