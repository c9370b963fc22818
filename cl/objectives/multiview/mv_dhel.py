"""MV-DHEL: alignment over all views, uniformity within each view by itself.

    loss_i = sum_v log sum_{j != i} exp <z_iv, z_jv> / tau  -  log sum_{u < v} exp <z_iu, z_iv> / tau

Koromilas et al. 2025, "A Principled Framework for Multi-View Contrastive Learning", section IV: no positive is in a
denominator, and no negative is of another view, so alignment and uniformity do not work against each other. A sample
without negatives has no loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.multiview.mv_infonce import MultiViewConfig, agreement
from cl.objectives.multiview.views import ManyViewsObjective


@OBJECTIVES.register(
    "mv-dhel",
    "alignment over all views at once, negatives within each view alone",
    paper="A Principled Framework for Multi-View Contrastive Learning",
)
class MultiViewDHEL(ManyViewsObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = MultiViewConfig

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [(view, view) for view in views]

    def tile(self, t: Tile) -> Reductions:
        return {"rest": row_lse(self.temperature() * t.scores, over="negatives")}

    def finish(self, s: Samples) -> list[Term]:
        rest = torch.stack([s["rest", view] for view in s.present]).sum(0)
        return [Term(rest - agreement(s, self.temperature()), s.valid() & rest.isfinite())]
