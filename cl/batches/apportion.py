"""Which share of each lane the first samples of an epoch take: Webster's apportionment, evaluated at any point.

Sample k (from 1) of a lane with n samples stands at time (k - 1/2) / n; an epoch runs through all samples by time,
ties by lane. So every stretch of an epoch holds each lane in proportion to its size, to within a sample or two,
and "how many of each lane come before position p" is a bisection over time: no state, O(lanes) memory.
"""

from __future__ import annotations

import numpy as np


def taken(sizes: np.ndarray, position: int) -> np.ndarray:
    """How many samples of each lane are among the first `position` of an epoch.

    Args:
        sizes: samples of each lane, int64 [lanes], all positive.
        position: from 0 to the sum of sizes.

    Returns:
        int64 [lanes] that sums to `position`; no entry falls as the position grows.
    """
    total = int(sizes.sum())
    if not 0 <= position <= total:
        raise ValueError(f"position {position} is not within 0..{total}")
    if position == total:
        return sizes.copy()
    # Invariant: fewer than or exactly `position` samples stand at or before `low`, more at or before `high`.
    low, high = -1.0, 1.0
    while True:
        middle = (low + high) / 2
        if middle <= low or middle >= high:
            break
        if int(_count(sizes, middle).sum()) <= position:
            low = middle
        else:
            high = middle
    before, upto = _count(sizes, low), _count(sizes, high)
    # What is still missing stands exactly at time `high`, in the order of the lanes.
    rest = position - int(before.sum())
    at = upto - before
    earlier = np.cumsum(at) - at
    return before + np.clip(rest - earlier, 0, at)


def _count(sizes: np.ndarray, time: float) -> np.ndarray:
    """Samples of each lane with (k - 1/2) / n <= time, in the arithmetic of float64."""
    k = np.floor(time * sizes + 0.5).astype(np.int64).clip(0, sizes)
    # The floor may be off by one where time * size rounds; the comparison itself decides.
    k += ((k + 0.5) / sizes <= time) & (k < sizes)
    k -= ((k - 0.5) / sizes > time) & (k > 0)
    return k
