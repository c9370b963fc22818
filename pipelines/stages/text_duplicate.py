"""Texts that are nearly the same: MinHash-LSH, every candidate verified.

Candidates are texts whose MinHash signatures (Broder 1997, "On the resemblance and containment of documents") agree in
all `rows` entries of one of `bands` bands (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", 3.4): two
texts of Jaccard similarity J are a candidate with probability

    P(J) = 1 - (1 - J^rows)^bands            16 bands of 6: P(.8) = .992, P(.9) > .9999, P(.5) = .22

A candidate counts if the Jaccard similarity of the two sets of shingles (`pipelines.shingles`), computed from the
texts, is at least `threshold`; so nothing that is dropped is less alike than that to the row that stays. Which rows
stay is said in `pipelines.stages.pairwise`. A text without a word is no duplicate of anything.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from scipy.sparse import csr_array

from cl.corpus import Kind
from pipelines.shingles import Unit, Words, band_keys, blocks, distinct, minhash
from pipelines.stages.base import Columns, Rows, text_fields, whole
from pipelines.stages.pairwise import Described, PairwiseDuplicates
from pipelines.stages.registry import STAGES

COMPARED = 1 << 22  # shingles that are compared at a time


def overlaps(left: pa.Array, i: np.ndarray, right: pa.Array, j: np.ndarray) -> np.ndarray:
    """Jaccard similarities, float64 [pairs], of the sets left[i] and right[j]: sorted lists of 64-bit numbers."""
    a, b = _incidence(left), _incidence(right)
    size_a, size_b = np.diff(a.indptr), np.diff(b.indptr)
    out = np.zeros(len(i))
    cuts = np.cumsum(size_a[i] + size_b[j]) // COMPARED
    for part in np.split(np.arange(len(i)), np.flatnonzero(np.diff(cuts)) + 1):
        if len(part):
            x, y = i[part], j[part]
            both = np.diff((a[x] * b[y]).indptr)
            out[part] = both / np.maximum(size_a[x] + size_b[y] - both, 1)
    return out


def _incidence(sets: pa.Array) -> csr_array:
    """One row a set; its columns are the set's members without their last bit, as scipy's indices are signed."""
    bounds = sets.offsets.to_numpy().astype(np.int64)
    members = (sets.values.to_numpy() >> np.uint64(1)).astype(np.int64)
    return csr_array((np.ones(len(members), np.int8), members, bounds), shape=(len(sets), np.iinfo(np.int64).max))


@STAGES.register(
    "text_duplicate",
    "Drop texts nearly the same as one that is kept: MinHash-LSH, verified by the Jaccard similarity of their shingles",
    "On the resemblance and containment of documents",
)
class TextDuplicate(PairwiseDuplicates):
    """Of text pairs both texts count, as one text. A task holds some 40 bytes a row and band of its partition."""

    value: ClassVar[tuple[str, pa.DataType]] = ("text_duplicate_jaccard", pa.float32())

    threshold: float = Field(0.8, gt=0, le=1, description="Jaccard similarity of shingles from which texts are alike")
    unit: Unit = Field("word", description="what shingles are made of: words or characters")
    shingle: int = Field(3, ge=1, le=64, description="units in a shingle")
    bands: int = Field(16, ge=1, le=256, description="bands of a signature")
    rows: int = Field(6, ge=1, le=64, description="entries of a band")
    columns: tuple[str, ...] | None = Field(None, description="texts to compare, joined; None: all of the sample")

    def _columns(self, kind: Kind) -> list[str]:
        return list(self.columns or text_fields(kind))

    def needs(self, kind: Kind) -> list[str]:
        return list(dict.fromkeys([*self._columns(kind), *self.rule_columns()]))

    def describe(self, rows: Rows) -> Described:
        digests, keys, taken = (
            [np.zeros((0, 2), np.uint64)],
            [np.zeros((0, self.bands), np.uint64)],
            [np.zeros(0, bool)],
        )
        for texts in blocks(_joined([rows.table[name] for name in self._columns(rows.corpus.kind)])):
            words = Words(texts, self.unit)
            digests.append(words.digests())
            taken.append(np.diff(words.bounds) > 0)
            keys.append(band_keys(minhash(*words.shingles(self.shingle), self.bands * self.rows), self.bands))
        digest = np.concatenate(digests)
        return Described(digest, np.concatenate(keys), np.zeros(len(digest), np.uint64), np.concatenate(taken))

    def payload(self, columns: Columns, fragment: int, rows: np.ndarray, kind: Kind) -> pa.Array:
        some = pa.array(rows)
        values, counts = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for texts in blocks(_joined([columns.read(fragment, name).take(some) for name in self._columns(kind)])):
            members, bounds = distinct(*Words(texts, self.unit).shingles(self.shingle))
            values.append(members)
            counts.append(np.diff(bounds))
        bounds = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
        return pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), pa.array(np.concatenate(values)))

    def alike(self, left: pa.Array, i: np.ndarray, right: pa.Array, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        jaccard = overlaps(left, i, right, j)
        return jaccard.astype(np.float32), jaccard >= self.threshold

    def size(self, rows: Rows) -> np.ndarray:
        lengths = [pc.utf8_length(rows.table[name].fill_null("")) for name in self._columns(rows.corpus.kind)]
        return np.asarray(sum(length.to_numpy().astype(np.float64) for length in lengths))


def _joined(columns: list[pa.ChunkedArray]) -> pa.StringArray:
    """One text a row from one or several columns; null counts as empty."""
    texts = [whole(column).fill_null("") for column in columns]
    return pc.binary_join_element_wise(*texts, "\n") if len(texts) > 1 else texts[0]
