"""MV-MR: distance correlation between an embedding and other representations of the same samples.

    a_kl, b_kl   distances |x_k - x_l|, |y_k - y_l| of the global batch;  A, B  the same, doubly centred
    dCov^2(x, y) = mean_kl A_kl B_kl = mean a b - 2 mean_k a_k. b_k. + a.. b..
    L            = mean over the other views y of  1 - dCov^2(x, y) / sqrt(dCov^2(x, x) dCov^2(y, y))

Kinakh et al. 2023, "MV-MR: multi-views and multi-representations for self-supervised learning and knowledge
distillation", on the distance correlation of Szekely, Rizzo and Bakirov 2007, "Measuring and testing dependence by
correlation of distances". The other views may be another augmentation, hand-crafted features, or a
frozen model's embeddings of any dimension; embeddings have length 1, so distances are sqrt(2 - 2 s).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl.engine.rule import Comparison, Reductions, Samples, Term, Tile, row_sum
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import TiledConfig, TiledObjective


@OBJECTIVES.register(
    "distance-correlation",
    "maximal distance correlation with other representations of the same samples (MV-MR)",
    paper="MV-MR: multi-views and multi-representations for self-supervised learning and knowledge distillation",
)
class DistanceCorrelation(TiledObjective):
    """See the module's formula."""

    Config = TiledConfig
    compares = "two or more views, of any dimensions"

    def comparisons(self, views: Sequence[str]) -> Sequence[Comparison]:
        first, *others = views
        return [Comparison(first, first, {other: (other, other) for other in others})]

    def tile(self, t: Tile) -> Reductions:
        own = distance(t.scores)
        found = {"n": row_sum(torch.ones_like(own), over="all")}
        found |= {"x": row_sum(own, over="all"), "xx": row_sum(own.square(), over="all")}
        for name, scores in t.channels.items():
            other = distance(scores)
            found[f"y {name}"] = row_sum(other, over="all")
            found[f"yy {name}"] = row_sum(other.square(), over="all")
            found[f"xy {name}"] = row_sum(own * other, over="all")
        return found

    def finish(self, s: Samples) -> list[Term]:
        count = s["n"] + 1  # the distance to oneself is 0, and counts
        x = s["x"] / count
        terms = [Term(s["xx"] / count), Term(x.square()), Term(x)]
        for name in list(s.views)[1:]:
            y = s[f"y {name}"] / count
            terms += [Term(s[f"yy {name}"] / count), Term(y.square()), Term(y)]
            terms += [Term(s[f"xy {name}"] / count), Term(x * y)]
        return terms

    def combine(self, means: Tensor) -> Tensor:
        def covariance(product: Tensor, centred: Tensor, mean: Tensor, other: Tensor) -> Tensor:
            return product - 2 * centred + mean * other

        xx, x_x, x = means[:3]
        own = covariance(xx, x_x, x, x)
        losses = []
        for yy, y_y, y, xy, x_y in means[3:].view(-1, 5):
            scale = (own * covariance(yy, y_y, y, y)).clamp_min(1e-24).sqrt()
            losses.append(1 - covariance(xy, x_y, x, y) / scale)
        return torch.stack(losses).mean()


def distance(scores: Tensor) -> Tensor:
    """|x - y| of unit vectors from their inner product; equal vectors have distance 0 and no slope."""
    square = 2 - 2 * scores
    apart = square > 1e-12
    return square.where(apart, 1).sqrt().where(apart, 0)
