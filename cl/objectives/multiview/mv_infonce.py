"""MV-InfoNCE: one term a sample, with all interactions of all views in it.

    loss_i = -log( sum_{u != v} exp l_iu,iv / sum_u sum_{(j, v) != (i, u)} exp l_iu,jv ),  l_iu,jv = <z_iu, z_jv> / tau

Koromilas et al. 2025, "A Principled Framework for Multi-View Contrastive Learning", section IV: u and v run over the
views, j over all samples. All pairs of a sample's views are one positive together, and every other embedding is
compared with every view. With two views the positive pair counts twice on both sides of the fraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.multiview.views import ManyViewsConfig, ManyViewsObjective
from cl.objectives.schedule import Scheduled


class MultiViewConfig(ManyViewsConfig):
    # All pairs of views are in one sum, of which a low temperature sees the most alike pair alone.
    temperature: Scheduled = Field(0.2, description="initial temperature; scores are divided by it")


def agreement(s: Samples, scale: Tensor) -> Tensor:
    """log sum_{u < v} exp <z_iu, z_iv> / tau of each sample [B]."""
    pairs = [scale * s.own(first, second) for first, second in combinations(s.present, 2)]
    return torch.stack(pairs).logsumexp(0)


@OBJECTIVES.register(
    "mv-infonce",
    "one softmax a sample over all interactions of any number of views",
    paper="A Principled Framework for Multi-View Contrastive Learning",
)
class MultiViewInfoNCE(ManyViewsObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = MultiViewConfig

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return list(combinations_with_replacement(views, 2))

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        if t.row_view == t.column_view:
            return {"all": row_lse(logits)}
        return {"all": [row_lse(logits), column_lse(logits)]}

    def finish(self, s: Samples) -> Tensor:
        every = torch.stack([s["all", view] for view in s.present]).logsumexp(0)
        pairs = agreement(s, self.temperature()) + torch.log(torch.tensor(2.0, dtype=every.dtype))
        return every - pairs
