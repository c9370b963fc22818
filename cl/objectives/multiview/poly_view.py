"""Poly-View: one view against all others of its sample, in three ways.

    p_i,uv     = exp l_iu,iv / ( exp l_iu,iv + sum_{j != i} sum_w exp l_iv,jw ),        l_iu,jv = <z_iu, z_jv> / tau
    geometric  : loss_i = -1/M sum_u 1/(M-1) sum_{v != u} log p_i,uv
    arithmetic : loss_i = -1/M sum_u log( 1/(M-1) sum_{v != u} p_i,uv )
    sufficient : loss_i = -1/M sum_u log( exp q_iu / ( exp q_iu + sum_{j != i} sum_w exp <r_iu, z_jw> / tau ) )
                 r_iu = 1/(M-1) sum_{v != u} z_iv,      q_iu = <r_iu, z_iu> / tau

Shidani et al. 2024, "Poly-View Contrastive Learning": means of the one-against-rest bounds over the M
views, and the mean of the other views as the sufficient statistic of the sample (not normalised). With two views all
three are the same: NT-Xent without the anchor's own other view among the negatives, which it has in the numerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from cl.engine.collectives import Layout
from cl.engine.rule import Reductions, Samples, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.multiview.views import ManyViewsConfig, ManyViewsObjective
from cl.pairs import Pairs

PAPER = "Poly-View Contrastive Learning"
REST = "rest of "  # the name of the mean of all views of a sample but one


class PolyView(ManyViewsObjective):
    """Each view's log-sum over all views of all other samples, and what is made of it."""

    Config = ManyViewsConfig

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return list(combinations_with_replacement(views, 2))

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        rows = row_lse(logits, over="negatives")
        return {"rest": rows if t.row_view == t.column_view else [rows, column_lse(logits, over="negatives")]}

    def surprises(self, s: Samples) -> Tensor:
        """-log p_i,uv of every sample: [M, M - 1, B], by u and by v != u."""
        views = list(s.present)
        found = []
        for first in views:
            row = []
            for second in views:
                if first != second:
                    own = self.temperature() * s.own(first, second)
                    row.append(torch.logaddexp(s["rest", second], own) - own)
            found.append(torch.stack(row))
        return torch.stack(found)


@OBJECTIVES.register("poly-view-geometric", "the mean over pairs of views of one-against-rest InfoNCE", paper=PAPER)
class Geometric(PolyView):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    def finish(self, s: Samples) -> Tensor:
        return self.surprises(s).mean((0, 1))


@OBJECTIVES.register("poly-view-arithmetic", "the probability of the right view, averaged over views", paper=PAPER)
class Arithmetic(PolyView):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    def finish(self, s: Samples) -> Tensor:
        surprises = self.surprises(s)
        others = torch.tensor(float(surprises.shape[1]), dtype=surprises.dtype, device=surprises.device)
        return (others.log() - (-surprises).logsumexp(1)).mean(0)


@OBJECTIVES.register("poly-view-sufficient", "each view against the mean of the sample's other views", paper=PAPER)
class Sufficient(PolyView):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [(rest, view) for rest in views if rest.startswith(REST) for view in views if not view.startswith(REST)]

    def derive(self, pairs: Pairs, layout: Layout) -> Pairs:
        pairs = super().derive(pairs, layout)
        views, present = dict(pairs.views), dict(pairs.present)
        for name in pairs.views:
            others = [other for other in pairs.views if other != name]
            views[REST + name] = torch.stack([pairs.views[other] for other in others]).mean(0)
            if masks := [pairs.present[other] for other in others if other in pairs.present]:
                present[REST + name] = torch.stack(masks).all(0)
        return replace(pairs, views=views, present=present)

    def tile(self, t: Tile) -> Reductions:
        return {"rest": row_lse(self.temperature() * t.scores, over="negatives")}

    def finish(self, s: Samples) -> Tensor:
        losses = []
        for view in s.present:
            if not view.startswith(REST):
                own = self.temperature() * s.own(REST + view, view)
                losses.append(torch.logaddexp(s["rest", REST + view], own) - own)
        return torch.stack(losses).mean(0)
