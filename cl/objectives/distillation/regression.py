"""Embedding regression: the student's embedding becomes the teacher's.

    L = mean_i d(W s_i, t_i),   d = |x - y|^2, 1 - cos(x, y), or smooth l1 summed over dimensions

Reimers and Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation" (squared
distance; also of a translation to the teacher's embedding of the original: name the views accordingly); Heffernan et
al. 2022, "Bitext Mining Using Distilled Sentence Representations for Low-Resource Languages" (cosine); smooth l1 as in
data2vec and latent bootstrapping. W maps to the teacher's dimensions where they differ. Needs teacher views.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, smooth_l1_loss

from cl.config import Config
from cl.engine import moments
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES, Objective
from cl.pairs import Pairs


class RegressionConfig(Config):
    targets: dict[str, str] = Field({"a": "a_teacher"}, description="student's view -> teacher's view", min_length=1)
    distance: Literal["squared", "cosine", "smooth_l1"] = Field("squared", description="d")
    beta: float = Field(1.0, gt=0, description="where smooth_l1 turns from a square to a line")
    teacher_dimensions: int | None = Field(None, ge=1, description="of the teacher; default: equal, and no W")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


@OBJECTIVES.register(
    "embedding-regression",
    "the student's embeddings become the teacher's",
    paper="Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
)
class EmbeddingRegression(Objective):
    """See the module's formula. Parameters: W, where the dimensions differ."""

    Config = RegressionConfig
    compares = "one or more views and their teacher's"
    needs = ("teacher views",)

    def __init__(self, config: RegressionConfig) -> None:
        super().__init__()
        assert config.dimensions is not None
        self.config = config
        same = config.teacher_dimensions in (None, config.dimensions)
        self.project = (
            nn.Identity() if same else nn.Linear(config.dimensions, config.teacher_dimensions or 1, bias=False)
        )

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        losses = []
        for student, teacher in self.config.targets.items():
            weight = pairs.view_weights(student).where(pairs.view_weights(teacher) > 0, 0)
            alive = (weight > 0)[:, None]
            mine = self.project(pairs.view(student).to(pairs.dtype).where(alive, 0))
            apart = self.apart(mine, pairs.view(teacher).detach().to(pairs.dtype).where(alive, 0))
            losses.append(moments.mean(apart[:, None], weight, workers)[0])
        return Outcome(moments.replicated(torch.stack(losses).mean(), workers))

    def apart(self, mine: Tensor, target: Tensor) -> Tensor:
        """[B]: d of each sample."""
        if self.config.distance == "cosine":
            return 1 - cosine_similarity(mine, target, dim=1)
        if self.config.distance == "squared":
            return (mine - target).square().sum(1)
        return smooth_l1_loss(mine, target, reduction="none", beta=self.config.beta).sum(1)
