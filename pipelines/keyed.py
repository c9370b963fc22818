"""Choices that depend on a seed and an id alone, so that no number of workers and no order of arrival changes them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import xxhash


def keyed_hash(seed: int, ids: Iterable[str], purpose: str = "") -> np.ndarray:
    """uint64 [n]: one number an id (32 hex digits), uniform and independent for each seed and purpose."""
    key = xxhash.xxh3_64_intdigest(f"{seed}\0{purpose}".encode())
    digest = xxhash.xxh3_64_intdigest
    return np.array([digest(value.encode(), seed=key) for value in ids], dtype=np.uint64)


def mix(words: np.ndarray) -> np.ndarray:
    """uint64 of any shape: a bijection that spreads every bit over all others (the finaliser of MurmurHash3)."""
    out = words ^ (words >> np.uint64(33))
    out *= np.uint64(0xFF51AFD7ED558CCD)
    out ^= out >> np.uint64(33)
    out *= np.uint64(0xC4CEB9FE1A85EC53)
    out ^= out >> np.uint64(33)
    return out


def id_words(ids: Iterable[str]) -> np.ndarray:
    """uint64 [n, 2]: 32 hex digits as two numbers whose order is that of the text."""
    data = bytes.fromhex("".join(ids))
    return np.frombuffer(data, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def id_text(words: np.ndarray) -> list[str]:
    """The 32 hex digits behind uint64 [n, 2]."""
    data = np.ascontiguousarray(words, dtype=">u8").tobytes().hex()
    return [data[start : start + 32] for start in range(0, len(data), 32)]
