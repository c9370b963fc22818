"""Alignment and uniformity, the two properties that contrast trades off, as a loss of their own.

    loss = align_weight mean_i |a_i - b_i|^alpha + uniform_weight (U(a) + U(b)) / 2
    U(x) = log mean_i mean_{j != i} exp(-t |x_i - x_j|^2)

Wang and Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
Hypersphere". Pairs i, j run over the samples of all workers, those of equal content left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse, row_sum
from cl.objectives.base import OBJECTIVES
from cl.objectives.pairwise.distance import own_squared_distance, power, square_norms, squared_distances
from cl.objectives.tiled import TiledConfig, TiledObjective


class AlignmentUniformityConfig(TiledConfig):
    alpha: float = Field(2.0, gt=0, description="exponent of the distance of the own pair")
    t: float = Field(2.0, gt=0, le=20, description="of the Gaussian potential exp(-t d^2)")
    align_weight: float = Field(1.0, ge=0, description="weight of alignment")
    uniform_weight: float = Field(1.0, ge=0, description="weight of uniformity")


@OBJECTIVES.register(
    "alignment-uniformity",
    "distance of the own pair, and the log of the mean Gaussian potential between samples",
    paper="Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere",
)
class AlignmentUniformity(TiledObjective):
    """See the module's formula. It has no parameters."""

    Config = AlignmentUniformityConfig

    def __init__(self, config: AlignmentUniformityConfig) -> None:
        super().__init__(config)
        self.config = config

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [(view, view) for view in views[:2]]

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        return square_norms(s, list(s.views)[:2])

    def tile(self, t: Tile) -> Reductions:
        distance = squared_distances(t)
        return {
            "potential": row_lse(-self.config.t * distance, over="negatives"),
            "others": row_sum(torch.ones_like(distance), over="negatives"),
        }

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        terms = [Term(power(own_squared_distance(s, first, second), self.config.alpha / 2))]
        for view in (first, second):
            others = s["others", view]
            mean = (s["potential", view] - others.clamp_min(1).log()).exp()
            terms.append(Term(mean, others > 0))
        return terms

    def combine(self, means: Tensor) -> Tensor:
        align, potentials = means[0], means[1:]
        # A batch without pairs has no potential, and no uniformity.
        uniform = potentials.where(potentials > 0, 1).log().mean()
        return self.config.align_weight * align + self.config.uniform_weight * uniform
