"""GroCo: a differentiable sorting network shall put every positive before every negative.

    sorted : the k closest negatives, then the positives, each group in ascending order of similarity
    P      = how much of each input comes to each rank, when every comparator of x and y of an odd-even network keeps
             the smaller in front by f(s (y - x)) and swaps by the rest;  f(x) = 1/2 + arctan(x) / pi
    loss_i = mean over the inputs of the binary cross-entropy of (mass of P on the positives' ranks, is a positive)

Shvetsova et al. 2023, "Learning by Sorting: Self-supervised Learning with Group Ordering Constraints", on
the network of Petersen et al. 2022, "Monotonic Differentiable Sorting Networks". Negatives are the samples of all
workers in the anchor's own view; with more than two views there are several positives. With `stop_candidates` only
anchors have a gradient. An anchor with fewer than k negatives, or without a positive, has no loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.collectives import Workers
from cl.engine.rule import Reductions, Samples, Term, Tile, row_top
from cl.objectives.base import OBJECTIVES, Outcome
from cl.objectives.tiled import TiledConfig, TiledObjective
from cl.pairs import Pairs

AS_CANDIDATE = "candidate "


class GroCoConfig(TiledConfig):
    negatives: int = Field(10, ge=1, le=64, description="k, the closest negatives that are sorted")
    steepness: float = Field(1.0, gt=0, description="s, how sharply a comparator decides")
    stop_candidates: bool = Field(True, description="no gradient through positives and negatives")


def odd_even_ranks(values: Tensor, steepness: float) -> Tensor:
    """P [B, n, n]: how much of each input of `values` [B, n] comes to each rank of an ascending order."""
    n = values.shape[1]
    ranks = torch.eye(n, dtype=values.dtype, device=values.device).expand(len(values), n, n)
    for layer in range(n if n > 1 else 0):
        low = torch.arange(layer % 2, n - 1, 2, device=values.device)
        first, second = values[:, low], values[:, low + 1]
        keep = 0.5 + (steepness * (second - first)).atan() / math.pi
        values = values.index_copy(1, low, keep * first + (1 - keep) * second)
        values = values.index_copy(1, low + 1, keep * second + (1 - keep) * first)
        before, after, keep = ranks[:, :, low], ranks[:, :, low + 1], keep[:, None]
        ranks = ranks.index_copy(2, low, keep * before + (1 - keep) * after)
        ranks = ranks.index_copy(2, low + 1, keep * after + (1 - keep) * before)
    return ranks


@OBJECTIVES.register(
    "groco",
    "a sorting network that must order positives before the closest negatives",
    paper="Learning by Sorting: Self-supervised Learning with Group Ordering Constraints",
)
class GroCo(TiledObjective):
    """See the module's formula. It has no parameters."""

    Config = GroCoConfig
    compares = "two or more views"

    def __init__(self, config: GroCoConfig) -> None:
        super().__init__(config)
        self.config = config

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        names = list(self.view_names or pairs.views)
        views = {name: pairs.view(name) for name in names}
        present = dict(pairs.present)
        for name in names:
            views[AS_CANDIDATE + name] = views[name].detach() if self.config.stop_candidates else views[name]
            if name in present:
                present[AS_CANDIDATE + name] = present[name]
        return super().forward(replace(pairs, views=views, present=present), workers)

    def anchors(self, names: Sequence[str]) -> list[str]:
        """The views that are sorted for, without their copies as candidates."""
        return [name for name in names if not name.startswith(AS_CANDIDATE)]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [(name, AS_CANDIDATE + name) for name in self.anchors(views)]

    def tile(self, t: Tile) -> Reductions:
        return {"closest": row_top(t.scores, self.config.negatives)}

    def finish(self, s: Samples) -> list[Term]:
        anchors = self.anchors(list(s.views))
        terms = []
        for name in anchors:
            negatives = s["closest", name].flip(1)
            others = [other for other in anchors if other != name]
            positives = torch.stack([s.own(name, AS_CANDIDATE + other) for other in others], 1)
            valid = s.valid(*anchors) & negatives.isfinite().all(1)
            ordered = torch.cat([negatives.where(valid[:, None], 0), positives.sort(1).values], 1)
            terms.append(Term(self.disorder(ordered, len(others)), valid, factor=1 / len(anchors)))
        return terms

    def disorder(self, ordered: Tensor, positives: int) -> Tensor:
        """[B]: how far the network is from ranking the last `positives` of each row [B, n] last."""
        ranks = odd_even_ranks(ordered, self.config.steepness)
        high, low = ranks[:, :, -positives:].sum(2), ranks[:, :, :-positives].sum(2)
        # The masses of an input sum to 1, so the two cross-entropies of the paper are one.
        right = torch.cat([low[:, :-positives], high[:, -positives:]], 1)
        return -right.log().mean(1)
