"""SEED: the student's similarities to a queue of the teacher's embeddings follow the teacher's own.

    p_i = softmax([t_i . c] / tau_t),  q_i = softmax([s_i . c] / tau_s)   over c in the teacher's batch and queue
    L   = mean_i - sum_c p_ic log q_ic

Fang et al. 2021, "SEED: Self-supervised Distillation for Visual Representation"; for sentences it is the
similarity-distribution distillation of self-supervised cross-view training (Limkonchotiwat et al. 2023). The candidates
are the teacher's embeddings of the whole batch (the sample's own among them) and of the last `queue` samples. Needs a
teacher view of the student's dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.rule import Comparison, Reductions, Samples, Tile, Tiler, row_lse, row_sum
from cl.engine.side import Side
from cl.memory.queue import Queue
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class SEEDConfig(ScaledConfig):
    teacher_view: str = Field("a_teacher", description="the teacher's view of the same samples")
    teacher_temperature: float = Field(0.01, gt=0, description="tau_t; the student's is `temperature`")
    temperature: Scheduled = Field(0.2, description="initial temperature; scores are divided by it")
    learn_temperature: bool = Field(False, description="train the log of the inverse temperature")
    queue: int = Field(65536, ge=1, description="earlier teacher embeddings to compare with")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


@OBJECTIVES.register(
    "seed",
    "the student's similarities to a queue of teacher embeddings follow the teacher's",
    paper="SEED: Self-supervised Distillation for Visual Representation",
)
class SEED(ScaledObjective):
    """See the module's formula."""

    Config = SEEDConfig
    compares = "one view and its teacher's"
    needs = ("teacher views",)
    state = ("queue",)

    def __init__(self, config: SEEDConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None
        self.teacher_view, self.sharpness = config.teacher_view, 1 / config.teacher_temperature
        self.queue = Queue(config.queue, config.dimensions)

    def comparisons(self, views: Sequence[str]) -> Sequence[Comparison]:
        student = next(view for view in views if view not in (self.teacher_view, "queue"))
        teacher = self.teacher_view
        return [
            Comparison(student, teacher, {"teacher": (teacher, teacher)}),
            Comparison(student, "queue", {"teacher": (teacher, "queue")}),
        ]

    def constants(self, pairs: Pairs) -> list[Side]:
        return [self.queue.side("queue", content=None)]

    def passes(self) -> Sequence[Tiler]:
        return [self.normalisers, self.tile]

    def normalisers(self, t: Tile) -> Reductions:
        return {
            "student": row_lse(self.temperature() * t.scores, over="all"),
            "teacher": row_lse(self.sharpness * t.channels["teacher"], over="all"),
        }

    def tile(self, t: Tile) -> Reductions:
        chance = (self.sharpness * t.channels["teacher"] - t.row("teacher")).exp()
        return {"loss": row_sum(chance * (t.row("student") - self.temperature() * t.scores), over="all")}

    def finish(self, s: Samples) -> Tensor:
        return s["loss"]

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        outcome = super().forward(pairs, workers)
        if self.training and torch.is_grad_enabled():
            layout = workers.layout(len(pairs), pairs.device)
            self.queue.push(pairs.view(self.teacher_view), None, pairs.weights(), layout)
        return outcome
