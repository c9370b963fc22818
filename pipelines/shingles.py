"""Texts as sets of shingles, and their MinHash signatures: whole batches of texts as numpy arrays.

A word is a run of letters, digits, marks and underscores; in scripts that are written without spaces every character
is one. A shingle is n words in a row; a text of fewer words has one shingle, of all it has, and a text without a word
has none. Case does not matter, and neither do compatibility forms (Unicode NFKC). Sets are of 64-bit hashes, so that
two texts of a thousand shingles are misjudged by a collision about once in 10^13 pairs.

The hash of a word c_0 ... c_k is the polynomial sum c_i B^i modulo 2^64. With S_i the running sum of c_i B^i over a
whole batch, that of the word from s to e is (S_e - S_s) B^-s: a few operations a character, none of them a loop.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.keyed import mix

BASE: Final = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
SECOND_BASE: Final = 0xC2B2AE3D27D4EB4F
BLOCK_BYTES: Final = 1 << 20  # of texts that are worked on together
# First and last character of scripts without spaces: Thai to Myanmar, Khmer, kana, CJK ideographs, their extensions.
UNSPACED: Final = [(0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x4DBF),
                   (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)]  # fmt: skip
# A text of these characters alone (ASCII, accented Latin, Cyrillic, dashes and quotes, kana, CJK, Hangul) is in NFKC.
SETTLED: Final = (
    r"\x00-\x7F\x{C0}-\x{131}\x{400}-\x{482}\x{2013}-\x{2016}\x{2018}-\x{201E}"
    r"\x{3041}-\x{3096}\x{4E00}-\x{9FFF}\x{AC00}-\x{D7A3}"
)
Unit = Literal["word", "character"]


@lru_cache(maxsize=1)
def word_classes() -> np.ndarray:
    """uint8 [code points]: 0 between words, 1 within words, 2 a word by itself."""
    classes = bytes(unicodedata.category(chr(code))[0] in "LNM" for code in range(0x110000))
    table = np.frombuffer(classes, np.uint8).copy()
    table[ord("_")] = 1
    for first, last in UNSPACED:
        table[first : last + 1] *= 2
    return table


@lru_cache(maxsize=8)
def powers(base: int, count: int) -> np.ndarray:
    """uint64 [count]: base^0, base^1, ... modulo 2^64."""
    out = np.ones(count, np.uint64)
    done = 1
    while done < count:
        more = min(done, count - done)
        np.multiply(out[:more], np.uint64(pow(base, done, 1 << 64)), out=out[done : done + more])
        done += more
    return out


class Words:
    """The words of a batch of n texts.

    Attributes:
        hashes: uint64 [words of all texts].
        bounds: int64 [n + 1]; the words of text i are those from bounds[i] to bounds[i + 1].
    """

    def __init__(self, texts: pa.StringArray, unit: Unit = "word") -> None:
        plain = normalised(texts)
        if unit == "character":
            plain = pc.utf8_trim_whitespace(pc.replace_substring_regex(plain, r"[\s\pZ]+", " "))
        lined = pc.binary_join_element_wise(plain, "", "\n")
        codes, lines = code_points(lined)
        if unit == "character":
            keep = np.ones(len(codes), bool)
            keep[lines[1:] - 1] = False
            self.hashes = mix(codes[keep].astype(np.uint64))
            self.bounds = lines - np.arange(len(lines))
            return
        kind = word_classes()[codes]
        change = np.flatnonzero((kind[1:] != kind[:-1]) | (kind[1:] == 2)) + 1  # where one run ends and another starts
        starts = np.concatenate([np.zeros(1, np.int64), change]) if len(codes) else change
        ends = np.concatenate([change, np.full(1, len(codes))]) if len(codes) else change
        inside = kind[starts] > 0
        starts, ends = starts[inside], ends[inside]
        table = max(BLOCK_BYTES, 1 << len(codes).bit_length())
        sums = np.zeros(len(codes) + 1, np.uint64)
        np.cumsum(np.multiply(codes, powers(BASE, table)[: len(codes)], dtype=np.uint64), out=sums[1:])
        self.hashes = mix((sums[ends] - sums[starts]) * powers(pow(BASE, -1, 1 << 64), table)[starts])
        self.bounds = np.searchsorted(starts, lines)

    def digests(self) -> np.ndarray:
        """uint64 [n, 2]: equal for texts with the same words in the same order, and for them alone."""
        counts = np.diff(self.bounds)
        place = np.arange(len(self.hashes)) - np.repeat(self.bounds[:-1], counts)
        longest = 1 << int(counts.max(initial=1)).bit_length()
        out = np.zeros((len(counts), 2), np.uint64)
        some = np.flatnonzero(counts)
        for column, base in enumerate((BASE, SECOND_BASE)):
            if len(some):
                terms = self.hashes * powers(base, longest)[place]
                out[some, column] = mix(np.add.reduceat(terms, self.bounds[some]) + counts[some].astype(np.uint64))
        return out

    def shingles(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """uint64 [shingles of all texts] with repetitions, and their bounds, int64 [n + 1]."""
        counts = np.diff(self.bounds)
        number = np.where(counts >= size, counts - size + 1, np.minimum(counts, 1))
        bounds = np.concatenate([[0], np.cumsum(number)])
        out = np.empty(bounds[-1], np.uint64)
        rolled, total = self.hashes.copy(), len(self.hashes)
        for words in range(1, size):
            short = np.flatnonzero(counts == words)
            out[bounds[short]] = rolled[self.bounds[short]]
            rolled[: total - words] = rolled[: total - words] * np.uint64(BASE) + self.hashes[words:]
        whole = counts >= size
        position = np.arange(total) - np.repeat(self.bounds[:-1], counts)
        out[np.repeat(whole, number)] = rolled[position < np.repeat(np.where(whole, number, 0), counts)]
        return mix(out), bounds


def normalised(texts: pa.StringArray) -> pa.StringArray:
    """Texts in NFKC and lower case; null counts as empty."""
    texts = texts.fill_null("")
    other = pc.match_substring_regex(texts, f"[^{SETTLED}]")
    if pc.any(other).as_py():
        composed = [unicodedata.normalize("NFKC", text) for text in texts.filter(other).to_pylist()]
        texts = pc.replace_with_mask(texts, other, pa.array(composed, pa.string()))
    return pc.utf8_lower(texts)


def code_points(texts: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """uint32 [characters of all texts], one text after the other, and their bounds, int64 [n + 1]; no null."""
    bounds = np.concatenate([[0], np.cumsum(pc.utf8_length(texts).to_numpy().astype(np.int64))])
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = texts.buffers()[2]
    if data is None or not bounds[-1]:
        return np.zeros(0, np.uint32), bounds
    encoded = data[int(offsets[0]) : int(offsets[-1])].to_pybytes().decode().encode("utf-32-le")
    return np.frombuffer(encoded, np.uint32), bounds


def blocks(texts: pa.StringArray) -> Iterator[pa.StringArray]:
    """Texts in batches of about `BLOCK_BYTES`; a longer text is alone."""
    ends = np.cumsum(pc.binary_length(texts.fill_null("")).to_numpy().astype(np.int64) + 1)
    start = 0
    while start < len(texts):
        before = ends[start - 1] if start else 0
        end = max(int(np.searchsorted(ends, before + BLOCK_BYTES, side="right")), start + 1)
        yield texts.slice(start, end - start)
        start = end


def minhash(values: np.ndarray, bounds: np.ndarray, count: int) -> np.ndarray:
    """Signatures, uint32 [n, count], of n sets of shingles; all ones for an empty set (Broder 1997).

    Entry k is the least value of x -> a_k x modulo 2^32, a_k odd: a permutation of random numbers, so two sets agree in
    an entry with a probability that is their Jaccard similarity.
    """
    some = np.flatnonzero(np.diff(bounds))
    out = np.full((len(bounds) - 1, count), np.iinfo(np.uint32).max, np.uint32)
    if len(some):
        keys = (values >> np.uint64(32)).astype(np.uint32)
        factors = mix(np.arange(1, count + 1, dtype=np.uint64)).astype(np.uint32) | np.uint32(1)
        starts, moved, least = bounds[some], np.empty_like(keys), np.empty((count, len(some)), np.uint32)
        for row, factor in enumerate(factors):
            np.multiply(keys, factor, out=moved)
            np.minimum.reduceat(moved, starts, out=least[row])
        out[some] = least.T
    return out


def band_keys(signatures: np.ndarray, bands: int) -> np.ndarray:
    """uint64 [n, bands]: what sets that agree in all entries of a band have in common, and others do not."""
    rows = signatures.shape[1] // bands
    out = np.broadcast_to(mix(np.arange(1, bands + 1, dtype=np.uint64)), (len(signatures), bands)).copy()
    for row in range(rows):
        out = mix(out * np.uint64(BASE) + signatures[:, row::rows])
    return out


def distinct(values: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each set sorted and without repetitions, and the bounds of that."""
    owner = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    bits = np.uint64(max(len(bounds) - 2, 0).bit_length())
    # One key of the owner and the upper bits sorts many times faster than two keys; it hardly ever leaves a tie wrong.
    order = (
        np.argsort((owner.astype(np.uint64) << (np.uint64(64) - bits)) | (values >> bits)) if bits else values.argsort()
    )
    same = owner[order][1:] == owner[order][:-1]
    if (same & (values[order][1:] < values[order][:-1])).any():
        order = np.lexsort((values, owner))
    values, owner = values[order], owner[order]
    first = np.ones(len(values), bool)
    first[1:] = (values[1:] != values[:-1]) | (owner[1:] != owner[:-1])
    counts = np.bincount(owner[first], minlength=len(bounds) - 1)
    return values[first], np.concatenate([[0], np.cumsum(counts)])
