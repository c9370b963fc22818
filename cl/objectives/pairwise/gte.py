"""GTE's improved contrastive loss: one sum over candidates of both directions and of both sides.

    Z_i    = sum_j e(a_i, c_j) + sum_{j != i} e(a_i, a_j) + sum_j e(a_j, c_i) + sum_{j != i} e(c_j, c_i)
    loss_i = log Z_i - l_ii,   e(x, y) = exp(<x, y> / tau)

Li et al. 2023, "Towards General Text Embeddings with Multi-stage Contrastive Learning" (improved contrastive
loss). The own pair is in both of the sums across sides, as the paper writes it. Mined negatives (`extra`) are
candidates of every a_i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import ScaledConfig, ScaledObjective


@OBJECTIVES.register(
    "gte",
    "InfoNCE with one sum over both directions and the candidates of the anchor's own side",
    paper="Towards General Text Embeddings with Multi-stage Contrastive Learning",
)
class SameSideNegatives(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = ScaledConfig

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        first, second = views[:2]
        return [(first, second), (first, first), (second, second), *((first, name) for name in self.extra)]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        if t.row_view == t.column_view or t.column_view in self.extra:
            return {"lse": row_lse(logits)}
        return {"lse": [row_lse(logits), column_lse(logits)]}

    def finish(self, s: Samples) -> Tensor:
        first, second = list(s.views)[:2]
        return torch.logaddexp(s["lse", first], s["lse", second]) - self.temperature() * s.own(first, second)
