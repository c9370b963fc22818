"""Generalised contrastive learning: a pair counts as much as it is relevant.

    loss_i = v_i [ (logsumexp_j l_ij - l_ii) + (logsumexp_j l_ji - l_ii) ] / 2,   v_i = weight of the relevance y_i

Zhu, Jung and Clark 2024, "Generalized Contrastive Learning for Multi-Modal Retrieval and Ranking". y is a label of
numbers [B]: the score of the sample's pair, not negative, or its rank, 1 for the best:

    of scores   linear      v = y           of ranks   reciprocal   v = 1 / y
                constant    v = 1                      inverse-log  v = 1 / log2(1 + y)

The mean is over all samples (`normalise: false`) or weighted by v (`normalise: true`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.pairwise.directed import DirectedConfig, DirectedObjective

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda y: y.clamp_min(0),
    "constant": torch.ones_like,
    "reciprocal": lambda y: 1 / y.clamp_min(1),
    "inverse-log": lambda y: 1 / (1 + y.clamp_min(1)).log2(),
}


class GradedWeightsConfig(DirectedConfig):
    label: str = Field("score", description="label [B]: relevance, or rank, of each sample's pair")
    weight: Literal["linear", "constant", "reciprocal", "inverse-log"] = Field("linear", description="weight from it")
    normalise: bool = Field(False, description="divide by the sum of the weights, not by the number of samples")


@OBJECTIVES.register(
    "gcl",
    "InfoNCE with each pair weighted by its graded relevance",
    paper="Generalized Contrastive Learning for Multi-Modal Retrieval and Ranking",
)
class GradedWeights(DirectedObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = GradedWeightsConfig
    needs = ("numbers as labels",)

    def __init__(self, config: GradedWeightsConfig) -> None:
        super().__init__(config)
        self.label, self.weight, self.normalise = config.label, WEIGHTS[config.weight], config.normalise

    def labels(self) -> list[str]:
        return [self.label]

    def tile(self, t: Tile) -> Reductions:
        return {"lse": self.each(row_lse, self.temperature() * t.scores)}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        positive, anchors = self.temperature() * s.own(first, second), self.anchors(s)
        weight = self.weight(s.meta[self.label].to(positive.dtype))
        losses = [Term(weight * (s["lse", view] - positive), factor=1 / len(anchors)) for view in anchors]
        return [*losses, Term(weight)]

    def combine(self, means: Tensor) -> Tensor:
        loss, weight = means[:-1].sum(), means[-1]
        return loss / weight.where(weight != 0, torch.ones_like(weight)) if self.normalise else loss
