"""A 64-bit perceptual hash and a thumbnail of every image, for near-duplicate search.

The hash is the sign pattern of the 8 x 8 lowest frequencies of the discrete cosine transform of the grey image at 32 x
32 pixels, against their median (the pHash of Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash
Functions"; the constant term, which holds the brightness alone, counts as above the median in every image). The
thumbnail is the picture at 8 x 8 pixels in colour: the hash sees neither colour nor contrast, the thumbnail both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from cl.corpus import Kind
from pipelines.stages.base import Output, PixelStage, Rows, internal
from pipelines.stages.registry import STAGES

SIDE = 32  # pixels of the grey image that is transformed
LOW = 8  # frequencies a direction that are kept
THUMBNAIL = 8  # pixels a side
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def _dct_rows(count: int, size: int) -> np.ndarray:
    """The first `count` rows of the orthonormal DCT-II matrix of a size, float32."""
    k, n = np.arange(count)[:, None], np.arange(size)[None, :]
    rows = np.cos(np.pi * k * (2 * n + 1) / (2 * size)) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    return rows.astype(np.float32)


_DCT = _dct_rows(LOW, SIDE)


def average_to(pixels: np.ndarray, side: int) -> np.ndarray:
    """Shrink float32 [H, W, C] to [side, side, C] by averaging areas, parts of pixels where sizes do not divide."""
    return np.einsum(
        "ih,hwc,jw->ijc", _area(pixels.shape[0], side), pixels, _area(pixels.shape[1], side), optimize=True
    )


_areas: dict[tuple[int, int], np.ndarray] = {}


def _area(size: int, side: int) -> np.ndarray:
    """float32 [side, size]: how much of each pixel lies in each of `side` equal intervals; rows sum to 1."""
    if (size, side) not in _areas:
        edges = np.linspace(0, size, side + 1)
        pixel = np.arange(size)
        overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        if len(_areas) > 4096:
            _areas.clear()
        _areas[size, side] = (np.clip(overlap, 0, None) * side / size).astype(np.float32)
    return _areas[size, side]


def perceptual_hash(pixels: np.ndarray) -> tuple[int, bytes]:
    """Hash (64 bits) and thumbnail (8 x 8 x 3 bytes) of uint8 [H, W, 3]."""
    small = average_to(pixels.astype(np.float32), SIDE)
    # Whole numbers: what is less than half a unit is rounding error, which must not decide the bits of a flat image.
    frequencies = np.rint(_DCT @ (small @ GREY) @ _DCT.T).ravel()
    bits = frequencies > np.median(frequencies[1:])
    bits[0] = True
    value = int.from_bytes(np.packbits(bits).tobytes(), "big")
    factor = SIDE // THUMBNAIL
    thumbnail = small.reshape(THUMBNAIL, factor, THUMBNAIL, factor, 3).mean((1, 3))
    return value, np.rint(thumbnail).astype(np.uint8).tobytes()


@STAGES.register(
    "perceptual_hash", "A 64-bit DCT hash and a thumbnail of every image; runs by itself before near_duplicate"
)
class PerceptualHash(PixelStage):
    """Has no settings: what is near is decided by `near_duplicate`, so a new threshold costs no new decoding."""

    def needs(self, kind: Kind) -> list[str]:
        return []

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [internal("phash", pa.uint64()), internal("thumbnail", pa.binary(THUMBNAIL * THUMBNAIL * 3))]

    def measure(self, pixels: np.ndarray) -> Any:
        return perceptual_hash(pixels)

    def finish(self, rows: Rows, measured: list[Any]) -> Output:
        hashes = np.array([value for value, _ in measured], np.uint64)
        thumbnails = pa.array([data for _, data in measured], pa.binary(THUMBNAIL * THUMBNAIL * 3))
        return Output({"phash": pa.array(hashes, pa.uint64()), "thumbnail": thumbnails})
