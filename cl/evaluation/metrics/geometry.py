"""Alignment and uniformity: how close the two sides of a pair are, and how evenly the sphere is used.

    alignment  = E_(x,y)~pairs |x - y|^alpha
    uniformity = log E_(x,y)~independent exp(-t |x - y|^2)

Both are better when lower. Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
Uniformity on the Hypersphere", ICML 2020. The expectation of uniformity is over all pairs of two different items of a
view (distinct images, distinct texts), summed exactly in chunks: O(M^2 D) time, O(chunk) memory.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from scipy.special import gammaln, ive
from torch import Tensor

from cl.config import Config
from cl.corpus import Kind
from cl.evaluation.items import Embedded
from cl.evaluation.registry import METRICS, Figure, Measured, Metric

PAPER = "Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere"
ROWS, COLUMNS = 1024, 8192  # a chunk of distances takes 32 MiB
SIDES = {"image-text": ("image", "text"), "text-text": ("anchor", "positive")}
BOTH: frozenset[Kind] = frozenset({"image-text", "text-text"})


def distance_power(left_P: Tensor, right_P: Tensor, alpha: float) -> float:
    """Mean of |x - y|^alpha over rows, computed from differences in float64. [P, D], [P, D]"""
    total = 0.0
    for start in range(0, len(left_P), ROWS):
        rows = slice(start, start + ROWS)
        distance = (left_P[rows].double() - right_P[rows].double()).norm(dim=1)
        total += distance.pow(alpha).sum().item()
    return total / len(left_P)


def cross_distance_power(left_A: Tensor, right_B: Tensor, alpha: float) -> float:
    """Mean of |x - y|^alpha over all x of one set and y of the other, unit vectors. [A, D], [B, D]"""
    if alpha == 2:  # |x - y|^2 = 2 - 2 x.y, and the mean of x.y is the product of the means
        return 2.0 - 2.0 * float(left_A.double().mean(dim=0) @ right_B.double().mean(dim=0))
    total = 0.0
    for start in range(0, len(left_A), ROWS):
        for column in range(0, len(right_B), COLUMNS):
            dots = left_A[start : start + ROWS] @ right_B[column : column + COLUMNS].T
            total += (2.0 - 2.0 * dots).clamp_min(0.0).double().pow(alpha / 2).sum().item()
    return total / (len(left_A) * len(right_B))


def uniformity(items_MD: Tensor, t: float) -> float:
    """log of the mean of exp(-t |x - y|^2) over all pairs of different items. Unit vectors [M, D], M > 1."""
    total = 0.0
    for start in range(0, len(items_MD), ROWS):
        for column in range(0, len(items_MD), COLUMNS):
            dots = items_MD[start : start + ROWS] @ items_MD[column : column + COLUMNS].T
            kernel = torch.exp(-t * (2.0 - 2.0 * dots.double()).clamp_min(0.0))
            own = torch.arange(start, start + kernel.shape[0], device=kernel.device) - column
            inside = (own >= 0) & (own < kernel.shape[1])
            kernel[torch.arange(len(own), device=kernel.device)[inside], own[inside]] = 0.0
            total += kernel.sum().item()
    return math.log(total / (len(items_MD) * (len(items_MD) - 1)))


def uniformity_of_sphere(dim: int, t: float) -> float:
    """Uniformity of points drawn evenly from the unit sphere of R^dim: -2t + log E exp(2t u), u = x.y.

    E exp(z u) = Gamma(dim/2) (2/z)^(dim/2 - 1) I_(dim/2 - 1)(z), the normaliser of von Mises-Fisher. Where the Bessel
    function underflows (dim in the hundreds), its series sum_k (z^2/4)^k / (k! (dim/2)_k) is summed instead.
    """
    z, order = 2.0 * t, dim / 2 - 1
    bessel = float(ive(order, z))
    if bessel > 1e-200:
        log_mean = float(gammaln(dim / 2)) + order * math.log(2.0 / z) + math.log(bessel) + z
    else:
        term = total = 1.0
        for k in range(1, 1000):
            term *= z * z / 4 / (k * (dim / 2 + k - 1))
            total += term
            if term < 1e-17 * total:
                break
        log_mean = math.log(total)
    return -2.0 * t + log_mean


class AlignmentOptions(Config):
    """Options of `alignment`."""

    alpha: float = Field(2.0, gt=0, description="power of the distance")


@METRICS.register("alignment", "mean distance between the two sides of a pair, beside that of strangers", paper=PAPER)
class Alignment(Metric[AlignmentOptions]):
    """E |x - y|^alpha over pairs; chance is the same over all combinations of the two sides."""

    kinds: ClassVar[frozenset[Kind]] = BOTH
    Options = AlignmentOptions

    def measure(self, data: Embedded) -> Measured:
        left, right = SIDES[data.kind]
        a, b = data.views[left].embeddings, data.views[right].embeddings
        pairs = torch.from_numpy(data.pairs(left, right)).to(a.device)
        figure = Figure(
            metric=f"alignment/{left}_{right}",
            value=distance_power(a[pairs[:, 0]], b[pairs[:, 1]], self.options.alpha),
            chance=cross_distance_power(a, b, self.options.alpha),
            higher_is_better=False,
            queries=len(pairs),
        )
        return Measured([figure])


class UniformityOptions(Config):
    """Options of `uniformity`."""

    t: float = Field(2.0, gt=0, description="inverse width of the Gaussian kernel")


@METRICS.register("uniformity", "how evenly the embeddings of each view cover the sphere", paper=PAPER)
class Uniformity(Metric[UniformityOptions]):
    """log E exp(-t |x - y|^2) of each view; chance is that of points drawn evenly from the sphere."""

    kinds: ClassVar[frozenset[Kind]] = BOTH
    Options = UniformityOptions

    def measure(self, data: Embedded) -> Measured:
        figures = []
        for view in SIDES[data.kind]:
            items = data.views[view].embeddings
            if len(items) > 1:
                figures.append(
                    Figure(
                        metric=f"uniformity/{view}",
                        value=uniformity(items, self.options.t),
                        chance=uniformity_of_sphere(items.shape[1], self.options.t),
                        higher_is_better=False,
                        queries=len(items),
                    )
                )
        return Measured(figures)
