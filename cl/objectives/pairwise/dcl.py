"""Decoupled contrastive learning: InfoNCE without the positive in its own sum.

    loss_i = f (logsumexp_{j != i} l_ij - l_ii) + (1 - f) (logsumexp_{j != i} l_ji - l_ii),  l_ij = <a_i, c_j> / tau

Yeh et al. 2022, "Decoupled Contrastive Learning", eq. 6: with the positive out of the denominator the gradient no
longer vanishes where the positive is already close, which helps small batches. f is 1/2, or 1 for anchors against
candidates. With `same_side` the negatives are, as in the paper, both views of all other samples; without, the other
view alone, as suits images and texts. A sample without any negative has no loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.pairwise.directed import DirectedConfig, DirectedObjective


class DecoupledConfig(DirectedConfig):
    same_side: bool = Field(False, description="other samples of the anchor's own view are negatives too")


@OBJECTIVES.register(
    "dcl",
    "InfoNCE with the positive left out of the sum over candidates",
    paper="Decoupled Contrastive Learning",
)
class Decoupled(DirectedObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = DecoupledConfig

    def __init__(self, config: DecoupledConfig) -> None:
        super().__init__(config)
        self.same_side = config.same_side

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        first, second = views[:2]
        return [(first, second), *((view, view) for view in [first, second][: 1 + self.both] if self.same_side)]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        if t.row_view == t.column_view:
            return {"rest": row_lse(logits, over="negatives")}
        return {"rest": self.each(row_lse, logits, over="negatives")}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        positive = self.temperature() * s.own(first, second)
        anchors = self.anchors(s)
        return [
            Term(s["rest", view] - positive, valid=s["rest", view].isfinite(), factor=1 / len(anchors))
            for view in anchors
        ]
