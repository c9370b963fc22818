"""Hard contrast: the softmax over the positive and the hardest negatives alone.

    H_i    = the k negatives with the largest s_ij among those with low <= s_ij <= s_ii + margin
    loss_i = logsumexp( l_ii, l_ij for j in H_i ) - l_ii,   l_ij = s_ij / tau

k, low and margin each apply where they are given. Negatives that score far below give next to no gradient, and those
above the positive are often no negatives at all: k as in Xiong et al. 2021, "Approximate Nearest Neighbor Negative
Contrastive Learning for Dense Text Retrieval"; the bound by the positive's score as in Moreira et al. 2024,
"NV-Retriever: Improving text embedding models with effective hard-negative mining" (TopK-MarginPos).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, column_lse, column_top, row_lse, row_top
from cl.objectives.base import OBJECTIVES
from cl.objectives.negatives.sides import Sides, SidesConfig


class HardestConfig(SidesConfig):
    k: int | None = Field(16, ge=1, description="negatives an anchor; null: all within the bounds")
    low: float | None = Field(None, description="least score (cosine) of a negative")
    margin: float | None = Field(None, description="most that a negative's score may exceed that of the positive")


@OBJECTIVES.register(
    "hardest-negatives",
    "softmax over the k hardest negatives, within bounds by score and by the positive's score",
    paper="NV-Retriever: Improving text embedding models with effective hard-negative mining",
)
class HardestNegatives(Sides):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = HardestConfig

    def __init__(self, config: HardestConfig) -> None:
        super().__init__(config)
        self.k, self.low, self.margin = config.k, config.low, config.margin

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        if self.margin is None:
            return {}
        first, second = list(s.views)[:2]
        own = s.own(first, second).detach()
        return {("own", first): own, ("own", second): own}

    def within(self, t: Tile, own: Tensor | None) -> Tensor | None:
        """[R, C] bool: the negatives within the bounds; None where there are none."""
        scores, mask = t.scores.detach(), None
        if self.low is not None:
            mask = scores >= self.low
        if own is not None and self.margin is not None:
            below = scores <= own + self.margin
            mask = below if mask is None else mask & below
        return mask

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        bounded = self.margin is not None
        rows = self.within(t, t.row("own") if bounded else None)
        columns = self.within(t, t.column("own") if bounded and t.columns.role == "view" else None)
        if self.k is None:
            return {"hard": self.ways(t, row_lse(logits, "negatives", rows), column_lse(logits, "negatives", columns))}
        by_row, by_column = row_top(logits, self.k, mask=rows), column_top(logits, self.k, mask=columns)
        return {"hard": self.ways(t, by_row, by_column)}

    def finish(self, s: Samples) -> list[Term]:
        own = self.positive(s)
        losses = []
        for view in self.anchors(s):
            hard = s["hard", view] if self.k is not None else s["hard", view][:, None]
            losses.append(torch.cat([own[:, None], hard], 1).logsumexp(1) - own)
        return self.mean(s, losses)
