"""Contrastive attraction and contrastive repulsion: positives compete among themselves, and so do negatives.

    loss_i = sum_k p+_ik d_ik - sum_j p-_ij d_ij,   d_xy = |x - y|^2
    p+_ik  = softmax over the positives of  t_positive d_ik    (the more distant, the more it is attracted)
    p-_ij  = softmax over the negatives of -t_negative d_ij    (the closer, the more it is repelled)

Zheng et al. 2023, "Contrastive Attraction and Contrastive Repulsion for Representation Learning". Positives are the
sample's other views (and `extra` of role positive), negatives those views of other samples; with more than two views
there are several positives. Each view is anchor once, and the loss is their mean. The weights carry gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, column_mean, row_mean
from cl.objectives.base import OBJECTIVES
from cl.objectives.pairwise.distance import square_norms, squared_distances
from cl.objectives.tiled import TiledConfig, TiledObjective


class CACRConfig(TiledConfig):
    t_positive: float = Field(1.0, ge=0, description="how much distant positives outweigh close ones; 0: not at all")
    t_negative: float = Field(2.0, ge=0, description="how much close negatives outweigh distant ones; 0: not at all")


@OBJECTIVES.register(
    "cacr",
    "attraction weighted among positives, repulsion weighted among negatives",
    paper="Contrastive Attraction and Contrastive Repulsion for Representation Learning",
)
class CACR(TiledObjective):
    """See the module's formula. It has no parameters."""

    Config = CACRConfig
    compares = "two or more views"

    def __init__(self, config: CACRConfig) -> None:
        super().__init__(config)
        self.config = config

    def anchors(self, names: Sequence[str]) -> list[str]:
        """The views, without what `extra` names."""
        return [name for name in names if name not in self.extra]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        anchors = self.anchors(views)
        return [*combinations(anchors, 2), *((view, name) for name in self.extra for view in anchors)]

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        return square_norms(s, s.views)

    def tile(self, t: Tile) -> Reductions:
        distance = squared_distances(t)
        near, far = -self.config.t_negative * distance, self.config.t_positive * distance
        attraction = [row_mean(far, distance, mask=t.positive)]
        repulsion = [row_mean(near, distance, over="negatives")]
        if t.column_view not in self.extra:
            attraction.append(column_mean(far, distance, mask=t.positive))
            repulsion.append(column_mean(near, distance, over="negatives"))
        return {"attraction": attraction, "repulsion": repulsion}

    def finish(self, s: Samples) -> list[Term]:
        anchors = self.anchors(list(s.views))
        return [
            Term(s["attraction", view] - s["repulsion", view], s.valid(view), factor=1 / len(anchors))
            for view in anchors
        ]
