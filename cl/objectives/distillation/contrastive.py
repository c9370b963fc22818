"""Contrastive distillation: the student finds the teacher's embedding of its own sample among those of all others.

    L = mean_i [ logsumexp_j (s_i . t_j) / tau - (s_i . t_i) / tau ],   j over the batch (and a queue) of the teacher

Tian, Krishnan and Isola 2020, "Contrastive Representation Distillation", in its softmax form, as DistilCSE (Gao et al.
2023, "DistilCSE: Effective Knowledge Distillation For Contrastive Sentence Embeddings") and interactive
contrastive learning (CLIP-KD: the student's pictures against the teacher's texts: name the views accordingly)
use it. Needs teacher views of the student's dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.engine.side import Side
from cl.memory.queue import Queue
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class ContrastiveDistillationConfig(ScaledConfig):
    targets: dict[str, str] = Field({"a": "a_teacher"}, description="student's view -> teacher's view", min_length=1)
    queue: int = Field(0, ge=0, description="earlier teacher embeddings as further negatives; of one target alone")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


@OBJECTIVES.register(
    "contrastive-distillation",
    "the student finds the teacher's embedding of its own sample among all others",
    paper="Contrastive Representation Distillation",
)
class ContrastiveDistillation(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = ContrastiveDistillationConfig
    compares = "one or more views and their teacher's"
    needs = ("teacher views",)
    state = ("queue (optional)",)

    def __init__(self, config: ContrastiveDistillationConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None
        self.targets = config.targets
        self.queue = Queue(config.queue, config.dimensions) if config.queue else None

    def comparisons(self, views: Sequence[str]) -> Sequence[tuple[str, str]]:
        pairs = list(self.targets.items())
        return pairs if self.queue is None else [*pairs, (pairs[0][0], "queue")]

    def constants(self, pairs: Pairs) -> list[Side]:
        return [] if self.queue is None else [self.queue.side("queue", content=pairs.content_columns())]

    def tile(self, t: Tile) -> Reductions:
        return {"lse": row_lse(self.temperature() * t.scores)}

    def finish(self, s: Samples) -> list[Term]:
        share = 1 / len(self.targets)
        return [
            Term(s["lse", mine] - self.temperature() * s.own(mine, theirs), s.valid(mine, theirs), share)
            for mine, theirs in self.targets.items()
        ]

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        outcome = super().forward(pairs, workers)
        if self.queue is not None and self.training and torch.is_grad_enabled():
            teacher = next(iter(self.targets.values()))
            layout = workers.layout(len(pairs), pairs.device)
            self.queue.push(pairs.view(teacher), pairs.content_columns(), pairs.view_weights(teacher), layout)
        return outcome
