"""Random numbers that depend on a seed alone: any thread of any worker can draw an augmentation again."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def uniforms(seed: int, count: int, skip: int = 0) -> list[float]:
    """`count` numbers in [0, 1) that depend on the seed alone (splitmix64), after the first `skip`."""
    out = []
    for step in range(skip + 1, skip + count + 1):
        z = (seed + step * 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        out.append(((z ^ (z >> 31)) >> 11) * 2.0**-53)
    return out
