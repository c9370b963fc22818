"""N-pair loss: one positive and the positives of all other anchors as negatives, on embeddings that are not normalised.

    loss_i = log( 1 + sum_{j : class of j is not that of i} exp( <a_i, b_j> - <a_i, b_i> ) ) + l2/2 (|a_i|^2 + |b_i|^2)

Sohn 2016, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective": the norm is regularised
because a margin could otherwise be bought by length. Without labels every other sample is a negative.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from pydantic import Field

from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import TiledConfig, TiledObjective


class NPairConfig(TiledConfig):
    label: str | None = Field(
        "class", description="label, int64 [B]; samples of one class are no negatives; null: none"
    )
    l2: float = Field(0.002, ge=0, description="weight of the squared length of the embeddings")


@OBJECTIVES.register(
    "npair",
    "inner products of unnormalised embeddings, one positive a sample, other classes as negatives",
    paper="Improved Deep Metric Learning with Multi-class N-pair Loss Objective",
)
class NPair(TiledObjective):
    """See the module's formula. No parameters."""

    Config = NPairConfig
    needs = ("class labels",)

    def __init__(self, config: NPairConfig) -> None:
        super().__init__(config)
        self.label, self.l2 = config.label, config.l2

    def labels(self) -> Collection[str]:
        return [] if self.label is None else [self.label]

    def tile(self, t: Tile) -> Reductions:
        mask = None
        if self.label is not None and t.columns.role == "view":
            row = t.row(self.label)
            mask = (row != t.column(self.label)) | (row < 0)
        return {"rest": row_lse(t.scores, over="negatives", mask=mask)}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.present)[:2]
        rest, own = s["rest", first], s.own(first, second)
        length = self.l2 / 2 * (s.own(first, first) + s.own(second, second))
        return [Term(torch.logaddexp(rest, own) - own + length, s.valid(first, second))]
