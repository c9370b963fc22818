"""What a ranking in random order scores, exactly.

A query has m correct candidates among n, and all n! orders are equally likely. The rank R of the first correct one then
has P(R > r) = C(n - m, r) / C(n, r); everything here follows from that. With m = 1 it is the familiar k/n.

All functions take one m for each query (`correct` [Q]) and return the mean (or median) over the queries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln


def survival(correct: NDArray[np.int64], candidates: int, rank: int) -> NDArray[np.float64]:
    """P(R > rank) for each query: no correct candidate among the first `rank`. [Q] -> [Q]"""
    misses = candidates - np.asarray(correct, dtype=np.float64)
    if rank <= 64:  # a short product is exact to the last digits
        product = np.ones_like(misses)
        for i in range(min(rank, candidates)):
            product *= np.maximum(misses - i, 0.0) / (candidates - i)
        return product
    safe = np.maximum(misses, rank)
    logs = gammaln(safe + 1) - gammaln(safe - rank + 1) - gammaln(candidates + 1) + gammaln(candidates - rank + 1)
    return np.where(misses >= rank, np.exp(logs), 0.0)


def recall(correct: NDArray[np.int64], candidates: int, k: int) -> float:
    """Expected share of queries with a correct candidate among the first k."""
    return float(np.mean(1.0 - survival(correct, candidates, min(k, candidates))))


def median_rank(correct: NDArray[np.int64], candidates: int) -> float:
    """Median of the rank of the first correct candidate, over queries and orders."""
    values, counts = np.unique(correct, return_counts=True)

    def reached(rank: int) -> float:
        return float(np.average(1.0 - survival(values, candidates, rank), weights=counts))

    def smallest(enough: float) -> int:
        low, high = 1, candidates
        while low < high:
            middle = (low + high) // 2
            if reached(middle) >= enough:
                high = middle
            else:
                low = middle + 1
        return low

    # As for a sample: where exactly half of the mass lies at or below a rank, the median is midway to the next.
    return (smallest(0.5 - 1e-12) + smallest(0.5 + 1e-12)) / 2


def reciprocal_rank(correct: NDArray[np.int64], candidates: int) -> float:
    """Expected 1/R: the sum over r of P(R = r) / r, with P(R = r) = C(n - r, m - 1) / C(n, m)."""
    values, counts = np.unique(np.asarray(correct, dtype=np.int64), return_counts=True)
    means = []
    for m in values.tolist():
        r = np.arange(1, candidates - m + 2, dtype=np.float64)
        log_ways = gammaln(candidates - r + 1) - gammaln(m) - gammaln(candidates - r - m + 2)
        log_all = gammaln(candidates + 1) - gammaln(m + 1) - gammaln(candidates - m + 1)
        means.append(np.sum(np.exp(log_ways - log_all) / r))
    return float(np.average(means, weights=counts))


def ndcg(correct: NDArray[np.int64], candidates: int, k: int) -> float:
    """Expected nDCG@k with binary gains: each of the first k places holds a correct candidate with probability m/n."""
    places = min(k, candidates)
    discounts = 1.0 / np.log2(np.arange(2, max(places, k) + 2))
    ideal = np.cumsum(discounts)
    m = np.asarray(correct, dtype=np.int64)
    return float(np.mean(m / candidates * discounts[:places].sum() / ideal[np.minimum(m, k) - 1]))
