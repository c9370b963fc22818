"""k-means on what one task holds, and its parts for what no task holds (`pipelines.stages.clusters`).

    seeds       greedy k-means++ (Arthur and Vassilvitskii 2007): each centroid the best of three points drawn in
                proportion to their squared distance from those before
    assignment  nearest centroid by cosine (spherical; Dhillon and Modha 2001) or Euclidean distance, by faiss
    update      the mean of what was assigned, of length 1 if spherical; sums in float64
    empty       a centroid without points goes beside that of the largest cluster, which it halves (as faiss does)

Everything is a function of its arguments: the same points in the same order give the same centroids.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator

import numpy as np

BLOCK = 8192  # points that are compared with the centroids at a time
SUMMED = 65_536  # points that are float64 at a time
SPLIT = 1 / 1024  # shift of the two centroids that come of one, of its length
TRIALS = 3  # points drawn for each seed


@contextlib.contextmanager
def faiss_threads(count: int) -> Iterator[None]:
    """faiss on so many CPUs; sums depend on it in the last bit."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def assign(points: np.ndarray, centroids: np.ndarray, spherical: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of float32 [n, D] (ties: the lower number), int32 [n], and the distance, float32 [n].

    The distance is 1 - cosine for points and centroids of length 1 (spherical), else the squared Euclidean one.
    """
    import faiss

    metric = faiss.METRIC_INNER_PRODUCT if spherical else faiss.METRIC_L2
    cluster, distance = np.zeros(len(points), np.int32), np.zeros(len(points), np.float32)
    for start in range(0, len(points), BLOCK):
        value, nearest = faiss.knn(points[start : start + BLOCK], centroids, 1, metric=metric)
        cluster[start : start + BLOCK] = nearest[:, 0]
        distance[start : start + BLOCK] = 1 - value[:, 0] if spherical else value[:, 0]
    return cluster, distance


def cluster_sums(points: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The clusters that occur, int64 [c] ascending, their sizes, int64 [c], and sums, float64 [c, D]."""
    from scipy.sparse import csr_array

    clusters, place, sizes = np.unique(cluster, return_inverse=True, return_counts=True)
    sums = np.zeros((len(clusters), points.shape[1]))
    for start in range(0, len(points), SUMMED):
        part = points[start : start + SUMMED].astype(np.float64)
        ones, column = np.ones(len(part)), np.arange(len(part))
        member = csr_array((ones, (place[start : start + SUMMED], column)), shape=(len(clusters), len(part)))
        sums += member @ part
    return clusters.astype(np.int64), sizes.astype(np.int64), sums


def centres(sums: np.ndarray, sizes: np.ndarray, spherical: bool) -> np.ndarray:
    """float32 [c, D]: the means of float64 [c, D] sums; of length 1 if spherical."""
    means = sums / np.maximum(sizes, 1)[:, None]
    return (unit(means) if spherical else means).astype(np.float32)


def unit(values: np.ndarray) -> np.ndarray:
    """Each row at length 1; a row of zeros stays."""
    length = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(length > 0, length, 1))


def fill_empty(centroids: np.ndarray, sizes: np.ndarray, spherical: bool) -> np.ndarray:
    """float32 [K, D] with each centroid of size 0 put beside that of the largest cluster, which it halves."""
    out = centroids.copy()
    largest = [(-size, cluster) for cluster, size in enumerate(sizes.tolist()) if size > 0]
    heapq.heapify(largest)
    signs = np.where(np.arange(out.shape[1]) % 2, -SPLIT, SPLIT).astype(np.float32) / out.shape[1] ** 0.5
    for empty in np.flatnonzero(sizes == 0).tolist():
        size, cluster = largest[0]
        shift = signs * np.linalg.norm(out[cluster])
        pair = np.stack([out[cluster] - shift, out[cluster] + shift])
        out[cluster], out[empty] = unit(pair) if spherical else pair
        heapq.heapreplace(largest, (size - size // 2, cluster))
        heapq.heappush(largest, (size // 2, empty))
    return out


def seeds(points: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [count, D]: centroids by greedy k-means++ among float32 [n, D], n >= count."""
    norms = np.einsum("nd,nd->n", points, points)
    chosen = [int(rng.integers(len(points)))]
    nearest = np.maximum(norms - 2 * (points @ points[chosen[0]]) + norms[chosen[0]], 0)
    for _ in range(1, count):
        nearest[chosen[-1]] = 0  # not quite so by rounding
        weight = np.cumsum(nearest, dtype=np.float64)
        if not weight[-1]:  # fewer distinct points than centroids
            chosen.append(int(rng.integers(len(points))))
            continue
        drawn = np.searchsorted(weight, rng.random(TRIALS) * weight[-1], side="right")
        square = norms[:, None] - 2 * (points @ points[drawn].T) + norms[drawn]
        left = np.minimum(np.maximum(square, 0), nearest[:, None])
        best = int(left.sum(0, dtype=np.float64).argmin())
        chosen.append(int(drawn[best]))
        nearest = left[:, best]
    return points[chosen]


def kmeans(
    points: np.ndarray, start: np.ndarray, iterations: int, spherical: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's iterations over float32 [n, D] from float32 [K, D]: centroids, float32 [K, D], and sizes, int64 [K].

    Sizes are those of the last assignment.
    """
    centroids, sizes = start, np.zeros(len(start), np.int64)
    for _ in range(iterations):
        cluster, _ = assign(points, centroids, spherical)
        found, counts, sums = cluster_sums(points, cluster)
        sizes = np.zeros(len(start), np.int64)
        sizes[found] = counts
        moved = np.zeros_like(centroids)
        moved[found] = centres(sums, counts, spherical)
        centroids = fill_empty(moved, sizes, spherical)
    return centroids, sizes
