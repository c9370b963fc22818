"""Decoupled contrastive learning: InfoNCE without the positive in its own sum.

    loss_i = f (logsumexp_{j != i} l_ij - l_ii) + (1 - f) (logsumexp_{j != i} l_ji - l_ii),  l_ij = <a_i, c_j> / tau

Yeh et al. 2022, "Decoupled Contrastive Learning", eq. 6: with the positive out of the denominator the gradient no
longer vanishes where the positive is already close, which helps small batches. f is 1/2, or 1 for anchors against
candidates. A sample without any negative has no loss.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cl.engine.rule import Reductions, Samples, Term, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import ScaledConfig, ScaledObjective


class DecoupledConfig(ScaledConfig):
    direction: Literal["both", "forward"] = Field("both", description="forward: first view against second alone")


@OBJECTIVES.register(
    "dcl",
    "InfoNCE with the positive left out of the sum over candidates",
    paper="Decoupled Contrastive Learning",
)
class Decoupled(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = DecoupledConfig

    def __init__(self, config: DecoupledConfig) -> None:
        super().__init__(config)
        self.both = config.direction == "both"

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        rows = row_lse(logits, over="negatives")
        return {"rest": [rows, column_lse(logits, over="negatives")] if self.both else rows}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        positive = self.temperature() * s.own(first, second)
        views = [first, second] if self.both else [first]
        return [
            Term(s["rest", view] - positive, valid=s["rest", view].isfinite(), factor=1 / len(views)) for view in views
        ]
