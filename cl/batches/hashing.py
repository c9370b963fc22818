"""Keyed hashes of integers: the source of every random choice about batches.

splitmix64's finaliser (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), chained over the
parts of a key. Unlike a library's generator its numbers will never change with a version, so a run can be resumed
years later.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(*parts: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of the parts, uint64; integer arrays broadcast against each other."""
    with np.errstate(over="ignore"):
        state = np.uint64(0x243F6A8885A308D3) * np.ones((), dtype=np.uint64)
        for part in parts:
            word = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(part & (2**64 - 1))
            state = (state ^ word) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * _MIX_1
            state = (state ^ (state >> np.uint64(27))) * _MIX_2
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) fixed by the key, int64."""
    return np.argsort(mix(*key, np.arange(size)), kind="stable")
