"""Soft targets: each anchor's distribution over candidates is given, and the model's is pulled towards it.

    loss_i = -sum_j p_ij log q_ij,   q_ij = softmax_j(l_ij),   p_ij = (1 - own) w_ij / sum_k w_ik + own [i = j]

What the affinities w are is each objective's own. The loss is the cross-entropy: the Kullback-Leibler divergence of p
and q plus the entropy of p, which has no gradient. Both directions take the same affinities, normalised along their own
axis. An anchor all of whose affinities are 0 has no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.reduction import Reduction
from cl.engine.rule import (
    Comparison,
    Reductions,
    Samples,
    Term,
    Tile,
    column_lse,
    column_mean,
    row_lse,
    row_mean,
)
from cl.objectives.pairwise.directed import DirectedConfig, DirectedObjective

Axis = Literal["row", "column"]


class SoftTargetsConfig(DirectedConfig):
    """Fields of every objective with soft targets."""

    own_share: float = Field(0.0, ge=0, le=1, description="part of the target that the own pair has beforehand")
    same_side: bool = Field(False, description="other samples of the anchor's own view are candidates too")


class SoftTargets(DirectedObjective):
    """See the module's formula: a subclass says what the affinities are."""

    def __init__(self, config: SoftTargetsConfig) -> None:
        super().__init__(config)
        self.own_share, self.same_side = config.own_share, config.same_side

    def log_affinity(self, t: Tile, axis: Axis) -> tuple[Tensor, Tensor | None]:
        """log w [R, C], and where w is not 0 [R, C] bool (None: everywhere), for anchors along `axis`. Constant in the
        gradient.
        """
        raise TypeError(f"{type(self).__name__} must define log_affinity(t, axis).")

    def logits(self, t: Tile) -> Tensor:
        """l [R, C]."""
        return self.temperature() * t.scores

    def own_logit(self, s: Samples) -> Tensor:
        """[B]: l of the own pairs."""
        first, second = list(s.views)[:2]
        return self.temperature() * s.own(first, second)

    def compared(self, views: Sequence[str]) -> list[tuple[str, str]]:
        """The pairs of views that are compared."""
        first, second = views[:2]
        return [(first, second), *([(first, first), (second, second)] if self.same_side else [])]

    def comparisons(self, views: Sequence[str]) -> Sequence[tuple[str, str] | Comparison]:
        return self.compared(views)

    def tile(self, t: Tile) -> Reductions:
        logits = self.logits(t)
        found = self.along(t, logits, "row")
        if t.row_view == t.column_view or not self.both:
            return found
        columns = self.along(t, logits, "column")
        return {name: [reduction, columns[name]] for name, reduction in found.items()}

    def along(self, t: Tile, logits: Tensor, axis: Axis) -> dict[str, Reduction]:
        """What anchors along `axis` learn of one tile."""
        lse, mean = (row_lse, row_mean) if axis == "row" else (column_lse, column_mean)
        affinity, mask = self.log_affinity(t, axis)
        affinity = affinity.to(logits.dtype)
        return {
            "lse": lse(logits),
            "pull": mean(affinity, logits, mask=mask),
            "mass": lse(affinity, mask=mask),
        }

    def pull(self, s: Samples, view: str) -> Tensor:
        """[B]: sum_j p_ij l_ij."""
        return (1 - self.own_share) * s["pull", view] + self.own_share * self.own_logit(s)

    def finish(self, s: Samples) -> list[Term]:
        anchors = self.anchors(s)
        terms = []
        for view in anchors:
            valid = s["mass", view].isfinite()
            loss = s["lse", view].where(valid, 0) - self.pull(s, view)
            terms.append(Term(loss, valid, factor=1 / len(anchors)))
        return terms


def log_of(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(log w, where w > 0) of weights that are not negative."""
    some = weights > 0
    return weights.where(some, torch.ones_like(weights)).log(), some
