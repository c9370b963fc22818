"""Images that look alike: a row goes only if it is itself within the thresholds of a row that stays.

Candidates are pairs of perceptual hashes within a Hamming distance d, found exactly: with the 64 bits cut into d + k
bands, two hashes that differ in at most d bits agree in at least k whole bands (pigeonhole; Norouzi et al. 2012, "Fast
Search in Hamming Space with Multi-Index Hashing"), so every choice of k bands is a key. k grows with the corpus, so
that few rows share a key; of more than `max_bucket` that do, each meets the first ones. A candidate counts if the true
Hamming distance is at most d and the thumbnails differ nowhere by more than `max_difference` levels: an average would
call any two small marks on white alike.

Which of alike rows stays is said in `pipelines.stages.pairwise`. No chain of likenesses joins what is not alike.
"""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import Field

from cl.corpus import Kind
from pipelines.keyed import mix
from pipelines.stages.base import Columns, Rows, Stage
from pipelines.stages.pairwise import Described, PairwiseDuplicates
from pipelines.stages.perceptual_hash import PerceptualHash
from pipelines.stages.registry import STAGES


def hamming_keys(hashes: np.ndarray, distance: int, count: int) -> np.ndarray:
    """uint64 [n, K] of hashes, uint64 [n]: two within `distance` bits have a key in common.

    Args:
        count: hashes in the corpus; the more, the more bands must agree (1 to 4), so that a key is shared by about
            eight strangers at most.
    """
    agree = next((k for k in range(1, 4) if count / 2 ** (64 * k / (distance + k)) <= 8), 4)
    bands = np.array_split(np.arange(64), distance + agree)
    masks = [sum(1 << int(bit) for bit in band) for band in bands]
    chosen = np.array([sum(each) for each in itertools.combinations(masks, agree)], np.uint64)
    return mix((hashes[:, None] & chosen) ^ mix(chosen))


@STAGES.register(
    "near_duplicate",
    "Drop images that look like one that is kept: perceptual hash, verified on the hash and on a thumbnail",
    "Fast Search in Hamming Space with Multi-Index Hashing",
)
class NearDuplicate(PairwiseDuplicates):
    """A task holds some 40 bytes a row and key of its partition, and thumbnails of its fragment's candidates."""

    version: ClassVar[int] = 2
    kinds: ClassVar[tuple[Kind, ...]] = ("image-text",)
    same: ClassVar[float] = 0.0
    value: ClassVar[tuple[str, pa.DataType]] = ("near_duplicate_distance", pa.int32())

    max_distance: int = Field(4, ge=0, le=10, description="bits of 64 in which two hashes may differ")
    max_difference: int = Field(
        16, ge=0, le=255, description="levels of 255 by which any pixel of two 8 x 8 thumbnails may differ"
    )

    def before(self, kind: Kind) -> list[Stage]:
        return [PerceptualHash()]

    def needs(self, kind: Kind) -> list[str]:
        sizes = ["width", "height"] if self.keep == "largest" else []
        return list(dict.fromkeys(["phash", "thumbnail", *self.rule_columns(), *sizes]))

    def describe(self, rows: Rows) -> Described:
        hashes = rows.table["phash"].to_numpy()
        thumbnails = [xxhash.xxh3_64_intdigest(value) for value in rows.table["thumbnail"].to_pylist()]
        digest = np.stack([mix(hashes), np.array(thumbnails, np.uint64)], 1)
        keys = hamming_keys(hashes, self.max_distance, rows.corpus.samples + rows.beside)
        return Described(digest, keys, hashes, np.ones(len(rows), bool))

    def plausible(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        near: np.ndarray = np.bitwise_count(left ^ right) <= self.max_distance
        return near

    def payload(self, columns: Columns, fragment: int, rows: np.ndarray, kind: Kind) -> pa.Array:
        some = pa.array(rows)
        hashes, thumbnails = (columns.read(fragment, name).take(some) for name in ("phash", "thumbnail"))
        pairs = zip(hashes.to_pylist(), thumbnails.to_pylist(), strict=True)
        return pa.array([value.to_bytes(8, "little") + thumbnail for value, thumbnail in pairs], pa.binary())

    def alike(self, left: pa.Array, i: np.ndarray, right: pa.Array, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (hashes, pixels), (others, their) = _unpacked(left), _unpacked(right)
        distance = np.bitwise_count(hashes[i] ^ others[j])
        near = distance <= self.max_distance
        at = np.flatnonzero(near)
        near[at] = np.abs(pixels[i[at]] - their[j[at]]).max(1, initial=0) <= self.max_difference
        return distance.astype(np.float32), near

    def size(self, rows: Rows) -> np.ndarray:
        return rows.numbers("width") * rows.numbers("height")


def _unpacked(payloads: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Hashes, uint64 [n], and thumbnails, int16 [n, bytes]."""
    values = payloads.to_pylist()
    width = len(values[0]) if values else 8
    data = np.frombuffer(b"".join(values), np.uint8).reshape(len(values), width)
    return np.ascontiguousarray(data[:, :8]).view("<u8").ravel(), data[:, 8:].astype(np.int16)
