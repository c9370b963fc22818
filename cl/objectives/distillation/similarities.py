"""Distillation of similarities: over the candidates of the global batch, the student ranks as the teacher does.

    p_ij = softmax_j(t_ij / tau_t)   teacher's scores of anchor i and candidate j
    q_ij = softmax_j(s_ij / tau_s)   student's scores
    L    = mean_i KL(p_i | q_i)      anchors to candidates, candidates to anchors, or both (halved)

For image-text pairs this is the distillation of CLIP's logits (Yang et al. 2024, "CLIP-KD: An Empirical Study of CLIP
Model Distillation": contrastive relational distillation; DiHT's and MobileCLIP's with an ensemble as teacher).
Teacher and student may have embeddings of different dimensions. Needs teacher views (`teachers` in the training config,
or cached).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from cl.engine.rule import (
    Comparison,
    Reduction,
    Reductions,
    Samples,
    Tile,
    Tiler,
    column_lse,
    column_sum,
    row_lse,
    row_sum,
)
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import ScaledConfig, ScaledObjective


class SimilaritiesConfig(ScaledConfig):
    teacher_views: list[str] = Field(
        ["a_teacher", "b_teacher"], min_length=2, max_length=2, description="the teacher's views, in the same order"
    )
    teacher_temperature: float = Field(0.07, gt=0, description="tau_t; the student's is `temperature`")
    direction: Literal["both", "forward"] = Field("both", description="forward: first view against second alone")


@OBJECTIVES.register(
    "similarity-distillation",
    "the student's similarities to all candidates follow the teacher's, in both directions (CLIP-KD)",
    paper="CLIP-KD: An Empirical Study of CLIP Model Distillation",
)
class SimilarityDistillation(ScaledObjective):
    """See the module's formula. Parameters: the log of the student's inverse temperature."""

    Config = SimilaritiesConfig
    needs = ("teacher views",)

    def __init__(self, config: SimilaritiesConfig) -> None:
        super().__init__(config)
        self.teacher_views, self.sharpness = config.teacher_views, 1 / config.teacher_temperature
        self.both = config.direction == "both"

    def students(self, views: Sequence[str]) -> list[str]:
        return [view for view in views if view not in self.teacher_views]

    def comparisons(self, views: Sequence[str]) -> Sequence[Comparison]:
        first, second = self.students(views)[:2]
        return [Comparison(first, second, {"teacher": (self.teacher_views[0], self.teacher_views[1])})]

    def passes(self) -> Sequence[Tiler]:
        return [self.normalisers, self.tile]

    def normalisers(self, t: Tile) -> Reductions:
        student, teacher = self.temperature() * t.scores, self.sharpness * t.channels["teacher"]
        found: dict[str, Reduction | Sequence[Reduction]] = {"student": row_lse(student), "teacher": row_lse(teacher)}
        if self.both:
            found = {
                "student": [row_lse(student), column_lse(student)],
                "teacher": [row_lse(teacher), column_lse(teacher)],
            }
        return found

    def tile(self, t: Tile) -> Reductions:
        student, teacher = self.temperature() * t.scores, self.sharpness * t.channels["teacher"]

        def divergence(lse_student: Tensor, lse_teacher: Tensor) -> Tensor:
            log_p = teacher - lse_teacher
            return log_p.exp() * (log_p - student + lse_student)

        rows = row_sum(divergence(t.row("student"), t.row("teacher")))
        if not self.both:
            return {"kl": rows}
        return {"kl": [rows, column_sum(divergence(t.column("student"), t.column("teacher")))]}

    def finish(self, s: Samples) -> Tensor:
        first, second = self.students(list(s.views))[:2]
        return (s["kl", first] + s["kl", second]) / 2 if self.both else s["kl", first]
