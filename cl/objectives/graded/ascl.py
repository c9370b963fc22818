"""Adaptive soft contrastive learning: near neighbours share in the positive, the more the surer the teacher is.

    p_ij   = softmax_{j != i}(<t_i, t_j> / teacher_temperature)
    c_i    = 1 - H(p_i) / log(number of negatives of i)
    w_ij   = min(1, neighbours c_i p_ij),   w_ii = 1
    loss_i = -sum_j (w_ij / sum_k w_ik) log softmax_j(l_ij)

Feng and Patras 2022, "Adaptive Soft Contrastive Learning", section III. t are the keys: the second view, whose encoder
is a momentum encoder in the paper (`teachers` in the training config), or the view that `teacher` names. Anchors are
the first view, candidates the second view of all workers' samples. Targets are constant in the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Comparison, Reductions, Samples, Term, Tile, Tiler, row_lse, row_mean, row_sum
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.tiled import ScaledConfig, ScaledObjective


class AdaptiveSoftConfig(ScaledConfig):
    temperature: Scheduled = Field(0.1, description="initial temperature; scores are divided by it")
    teacher_temperature: float = Field(0.05, gt=0, description="similarities of keys are divided by it")
    neighbours: float = Field(1.0, ge=0, description="how many neighbours share in the positive; 0: InfoNCE")
    teacher: str | None = Field(None, description="view whose similarities are the targets; default: the second view")


@OBJECTIVES.register(
    "ascl",
    "soft positives from a teacher's neighbours, weighted by its confidence",
    paper="Adaptive Soft Contrastive Learning",
)
class AdaptiveSoft(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = AdaptiveSoftConfig
    stopped = frozenset({"normaliser", "expected", "count"})
    needs = ("a momentum encoder or a teacher view",)

    def __init__(self, config: AdaptiveSoftConfig) -> None:
        super().__init__(config)
        self.config = config

    def comparisons(self, views: Sequence[str]) -> list[Comparison]:
        first, second = views[:2]
        teacher = self.config.teacher or second
        return [Comparison(first, second, {"teacher": (teacher, teacher)})]

    def passes(self) -> list[Tiler]:
        return [self.confidence, self.tile]

    def teacher_logits(self, t: Tile) -> Tensor:
        return t.channels["teacher"].detach() / self.config.teacher_temperature

    def confidence(self, t: Tile) -> Reductions:
        """First, the teacher's distributions over negatives: -H(p_i) = sum_j p_ij logit_ij - normaliser_i."""
        logits = self.teacher_logits(t)
        return {
            "normaliser": row_lse(logits, over="negatives"),
            "expected": row_mean(logits, logits, over="negatives"),
            "count": row_sum(torch.ones_like(logits), over="negatives"),
        }

    def tile(self, t: Tile) -> Reductions:
        """Then, the weights."""
        entropy = t.row("normaliser") - t.row("expected")
        most = t.row("count").clamp_min(2).log()
        share = (self.teacher_logits(t) - t.row("normaliser")).clamp_max(0).exp()
        weight = (self.config.neighbours * (1 - entropy / most) * share).clamp(0, 1)
        logits = self.temperature() * t.scores
        return {
            "lse": row_lse(logits),
            "pull": row_sum(weight * logits, over="negatives"),
            "mass": row_sum(weight, over="negatives"),
        }

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        pull = self.temperature() * s.own(first, second) + s["pull", first]
        return [Term(s["lse", first] - pull / (1 + s["mass", first]))]
