"""Embeddings of images whose texts are masked: does a picture match its caption by what it shows, or by what it says?

Maini et al. 2024, "T-MARS: Improving Visual Representations by Circumventing Text Feature Learning": a CLIP score is
high for a picture that merely holds the words of its caption, and such pairs teach reading rather than seeing. Text is
detected, its regions are filled with the average colour around them, the picture is scored again, and the best half
stays:

    stages: [embedding, masked_embedding, image_text_score: {columns: [masked_image_embedding, text_embedding],
             top_fraction: 0.5}]

Detectors are plug-ins (`pipelines.detectors`).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.detectors.registry import TEXT_DETECTORS
from pipelines.heavy import MISSING_BYTES, UndecodableError, decode_whole
from pipelines.stages.base import Output, Rows, reasons, vector_array
from pipelines.stages.embedding import IMAGE_COLUMNS, Embedding, Encoder
from pipelines.stages.registry import STAGES

RING = 4  # pixels around a text whose colour fills it


def text_mask(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool [H, W]: the pixels in any of int [n, 4] boxes."""
    mask = np.zeros((height, width), bool)
    for left, top, right, bottom in boxes.tolist():
        mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    return mask


def without_text(pixels: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] with every box filled with the mean of the pixels around it that lie in no box.

    A box with no such pixels gets the mean of all pixels in no box, and if there are none, of the picture.
    """
    mask = text_mask(boxes, *pixels.shape[:2])
    outside = pixels[~mask]
    everywhere = (outside if len(outside) else pixels.reshape(-1, 3)).mean(0)
    out = pixels.copy()
    for left, top, right, bottom in boxes.tolist():
        around = (slice(max(top - RING, 0), bottom + RING), slice(max(left - RING, 0), right + RING))
        ring = pixels[around][~mask[around]]
        out[max(top, 0) : bottom, max(left, 0) : right] = np.rint(ring.mean(0) if len(ring) else everywhere)
    return out


class MaskedEncoder:
    """A loaded model and a detector that embed the pictures of rows; those without text keep their embedding."""

    def __init__(self, encoder: Encoder, detector: str) -> None:
        self.encoder = encoder
        self.detect = TEXT_DETECTORS[detector]()

    def __call__(self, rows: Rows) -> Output:
        values = rows.vectors("image_embedding").astype(np.float16)
        area = np.zeros(len(rows), np.float32)
        broken: dict[int, str] = {}
        masked: dict[int, bytes] = {}
        for row, data in enumerate(rows.images()):
            if data is None:
                broken[row] = MISSING_BYTES
                continue
            try:
                pixels = decode_whole(data)
            except UndecodableError as error:
                broken[row] = str(error)
                continue
            boxes = self.detect(pixels)
            area[row] = text_mask(boxes, *pixels.shape[:2]).mean()
            if area[row]:
                masked[row] = _png(without_text(pixels, boxes))
            if len(masked) == self.encoder.batch_size:
                self._embed(masked, values)
        self._embed(masked, values)
        return Output({"masked_image_embedding": vector_array(values), "text_area": area}, broken=broken)

    def _embed(self, masked: dict[int, bytes], values: np.ndarray) -> None:
        """Embed what has gathered, and forget it."""
        if masked:
            values[list(masked)] = self.encoder.pictures(list(masked.values()))
            masked.clear()


@STAGES.register(
    "masked_embedding",
    "Embeddings of images with their texts masked, and the share of a picture that is text",
    "T-MARS: Improving Visual Representations by Circumventing Text Feature Learning",
)
class MaskedEmbedding(Embedding):
    """Writes `masked_image_embedding` and `text_area`."""

    kinds: ClassVar[tuple[Kind, ...]] = ("image-text",)

    detector: str = Field("rapidocr", description="text detector; another package can register one")
    max_area: float | None = Field(None, ge=0, le=1, description="share of text above which a picture is dropped")

    def needs(self, kind: Kind) -> list[str]:
        return [*IMAGE_COLUMNS, "image_embedding"]

    def makes(self, kind: Kind) -> list[pa.Field]:
        (width,) = {made.type for made in super().makes(kind)}
        return [pa.field("masked_image_embedding", width), pa.field("text_area", pa.float32())]

    def resolve(self, model: str | None, kind: Kind) -> Any:
        TEXT_DETECTORS[self.detector]  # refuses a name that is not known
        return super().resolve(model, kind)

    def open(self) -> Callable[[Rows], Output]:
        encode = MaskedEncoder(Encoder(str(self.model), self.batch_size, self.precision, self.threads), self.detector)

        def run(rows: Rows) -> Output:
            output = encode(rows)
            if self.max_area is not None:
                output.drop = reasons(len(rows), {"too_much_text": output.columns["text_area"] > self.max_area})
            return output

        return run


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=1)
    return buffer.getvalue()
