"""DINO: self-distillation without labels; a student's views match the teacher's distribution over learnt classes.

    p_t(v) = softmax((g_t(v) - centre) / tau_t)      p_s(v) = softmax(g_s(v) / tau_s)
    L      = mean over teacher views v and student views v' != v of  mean_i - sum_k p_t(v)_ik log p_s(v')_ik
    centre <- m centre + (1 - m) mean_i g_t          after the loss, over the teacher's views of the global batch

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", eq. 1 to 4; g is a three-layer head
whose output of length 1 is compared with K directions of length 1. The teacher's head is a moving average of the
student's. The first views are those that the teacher sees as `teacher_views`, in the same order; further ones (local
crops) are the student's alone. Needs teacher views (`teachers` of kind ema in the training config). With
local-to-global crops beside a contrastive loss it is SILC's self-distillation (Naeem et al. 2023).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from cl.engine import moments
from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES
from cl.objectives.moment import MomentConfig, MomentObjective, Rows
from cl.objectives.moving import MovingAverage
from cl.objectives.schedule import Scheduled, value_at
from cl.pairs import Pairs


class DINOConfig(MomentConfig):
    teacher_views: list[str] = Field(["a_teacher", "b_teacher"], min_length=1, description="the teacher's views")
    hidden: int = Field(2048, ge=1, description="width of the head's hidden layers")
    bottleneck: int = Field(256, ge=1, description="width of the head's output")
    prototypes: int = Field(65536, ge=2, description="K, learnt classes")
    student_temperature: float = Field(0.1, gt=0, description="tau_s")
    teacher_temperature: Scheduled = Field(0.04, description="tau_t, a number or a ramp")
    centre_momentum: float = Field(0.9, ge=0, le=1, description="m of the centre")
    momentum: Scheduled = Field(0.996, description="of the head's moving average; a number or a ramp")


class PrototypeHead(nn.Module):
    """Three layers with GELU, then cosine similarities to K directions: [B, D] -> [B, K]."""

    def __init__(self, dimensions: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dimensions, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        # As in the authors' program. Biases of the usual size would outweigh embeddings of length 1, and all samples
        # would be of one class from the start.
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.directions = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, rows: Tensor) -> Tensor:
        return unit(self.layers(rows)) @ unit(self.directions).T


@OBJECTIVES.register(
    "dino",
    "self-distillation: the student's views match the teacher's sharpened, centred distribution over learnt classes",
    paper="Emerging Properties in Self-Supervised Vision Transformers",
)
class DINO(MomentObjective):
    """See the module's formula."""

    Config = DINOConfig
    compares = "two or more views of one tower"
    needs = ("teacher views",)
    state = ("centre", "the head's moving average")
    memory = "batch x prototypes"
    centre: Tensor

    def __init__(self, config: DINOConfig) -> None:
        super().__init__(config)
        self.config = config
        self.head = PrototypeHead(self.width, config.hidden, config.bottleneck, config.prototypes)
        self.slow = MovingAverage(self.head)
        self.register_buffer("centre", torch.zeros(config.prototypes))

    def names(self, pairs: Pairs) -> list[str]:
        return [name for name in super().names(pairs) if name not in self.config.teacher_views]

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        rows = self.rows(pairs, workers)
        students = [(self.head(view) / self.config.student_temperature).log_softmax(1) for view in rows.views]
        teachers = self._teachers(pairs, rows, workers)
        temperature = value_at(self.config.teacher_temperature, pairs.clock)
        losses = [
            -(((teacher - self.centre) / temperature).softmax(1) * student).sum(1)
            for t, teacher in enumerate(teachers)
            for s, student in enumerate(students)
            if s != t
        ]
        loss = moments.replicated(rows.mean(torch.stack(losses).mean(0), workers), workers)
        if self.training and torch.is_grad_enabled():
            batch = torch.stack([moments.mean(each, rows.weight, workers) for each in teachers]).mean(0)
            self.centre.lerp_(batch, 1 - self.config.centre_momentum)
        return Outcome(loss)

    @torch.no_grad()
    def _teachers(self, pairs: Pairs, rows: Rows, workers: Workers) -> list[Tensor]:
        if self.training:
            self.slow.follow(self.head, value_at(self.config.momentum, pairs.clock))
        alive = (rows.weight > 0)[:, None]
        return [self.slow(pairs.view(name).to(pairs.dtype).where(alive, 0)) for name in self.config.teacher_views]
