"""Circle loss: each similarity is pushed in proportion to how far it is from its optimum.

    loss_i = log( 1 + sum_{n in N(i)} exp(  gamma [s_in + m]+     (s_in - m)     )
                    * sum_{p in P(i)} exp( -gamma [1 + m - s_ip]+ (s_ip - 1 + m) ) ),      s_ij = <z_i, z_j>

Sun et al. 2020, "Circle Loss: A Unified Perspective of Pair Similarity Optimization", eq. 6, with O_p = 1 + m, O_n =
-m, D_p = 1 - m, D_n = m; the factors [.]+ carry no gradient. Anchors without a positive or without a negative have no
loss.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.labelled import LabelledConfig, LabelledObjective, each_anchor


class CircleConfig(LabelledConfig):
    margin: float = Field(0.25, ge=0, le=1, description="m, the relaxation")
    gamma: float = Field(80.0, gt=0, description="the scale")


@OBJECTIVES.register(
    "circle",
    "similarities pushed in proportion to their distance from the optimum (metric learning)",
    paper="Circle Loss: A Unified Perspective of Pair Similarity Optimization",
)
class Circle(LabelledObjective):
    """See the module's formula. No parameters."""

    Config = CircleConfig

    def __init__(self, config: CircleConfig) -> None:
        super().__init__(config)
        self.margin, self.gamma = config.margin, config.gamma

    def tile(self, t: Tile) -> Reductions:
        positives, fixed = self.positives(t), t.scores.detach()
        pull = -self.gamma * (1 + self.margin - fixed).relu() * (t.scores - 1 + self.margin)
        push = self.gamma * (fixed + self.margin).relu() * (t.scores - self.margin)
        return {"pull": self.lse(t, pull, mask=positives), "push": self.lse(t, push, mask=~positives)}

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            pull, push = s["pull", view], s["push", view]
            return torch.logaddexp(torch.zeros_like(pull), pull + push), pull.isfinite() & push.isfinite()

        return each_anchor(s, loss)
