"""Any objective on what a projector and a predictor make of the views, and not on the views themselves.

    L = L_inner( q(g(v)) for `views`,  g'(v) for `teacher_views` )          all of length 1

g is the projector, q the predictor, g' the projector's moving average: g' <- m g' + (1 - m) g. Around `ntxent` it is
SimCLR (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", section 2.1); around
`moco-v3`, with a predictor and the views of a teacher, MoCo v3 (Chen, Xie and He 2021, "An Empirical Study of Training
Self-Supervised Vision Transformers", section 3). What is compared in training is thus not the embedding that is used
afterwards. Batch norms in the heads take the moments of the global batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cl.config import Config
from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.errors import ConfigError
from cl.objectives.base import OBJECTIVES, Objective, ObjectiveConfig, build_objective
from cl.objectives.heads import Head
from cl.objectives.moving import MovingAverage
from cl.objectives.schedule import Scheduled, value_at
from cl.pairs import Pairs


class ProjectedConfig(Config):
    objective: ObjectiveConfig = Field(description="the objective on the projections, which keep their views' names")
    views: list[str] = Field(
        min_length=1, description="the views that are projected; the inner objective sees no others"
    )
    projector: list[int] = Field(min_length=1, description="widths of its layers, the output's last")
    predictor: list[int] = Field([], description="widths of its layers, the output's last; empty: none")
    teacher_views: list[str] = Field([], description="views of a teacher, through the projector's moving average")
    momentum: Scheduled = Field(0.996, description="m, of the moving average; a number or a ramp")
    dimensions: int | None = Field(None, ge=1, description="of the views; default: the embeddings of the model")

    @model_validator(mode="after")
    def _widths_fit(self) -> ProjectedConfig:
        if self.predictor and self.predictor[-1] != self.projector[-1]:
            raise ValueError(
                f"the predictor's output ({self.predictor[-1]}) must be as wide as the projector's "
                f"({self.projector[-1]})"
            )
        return self


@OBJECTIVES.register(
    "projected",
    "any objective on projections of the views, with a predictor and a moving average of the projector",
    paper="A Simple Framework for Contrastive Learning of Visual Representations",
)
class Projected(Objective):
    """See the module's formula. Parameters: projector and predictor, and those of the inner objective."""

    Config = ProjectedConfig
    compares = "what the inner objective compares"
    needs = ("what the inner objective needs",)
    state = ("the projector's moving average", "that of the inner objective")
    memory = "that of the inner objective"

    def __init__(self, config: ProjectedConfig, inner: Objective) -> None:
        super().__init__()
        assert config.dimensions is not None
        self.config, self.inner = config, inner
        self.projector = Head([config.dimensions, *config.projector])
        self.predictor = Head([config.projector[-1], *config.predictor]) if config.predictor else None
        self.slow = MovingAverage(self.projector) if config.teacher_views else None

    @classmethod
    def build(cls, config: Any, dimensions: int | None) -> Projected:
        if config.dimensions is None:
            config = config.model_copy(update={"dimensions": dimensions})
        if config.dimensions is None:
            raise ConfigError("projected needs the field dimensions: the size of the views.")
        return cls(config, build_objective(config.objective, config.projector[-1]))

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        views = {}
        for name in self.config.views:
            weight = pairs.view_weights(name)
            made = self.projector(pairs.view(name).to(pairs.dtype), weight, workers)
            made = made if self.predictor is None else self.predictor(made, weight, workers)
            views[name] = unit(made.where((weight > 0)[:, None], 0))
        inside = replace(pairs, views=views | self._taught(pairs, workers), tokens={}, extra={})
        return self.inner(inside, workers)

    @torch.no_grad()
    def _taught(self, pairs: Pairs, workers: Workers) -> dict[str, Tensor]:
        """The teacher's views through the slow projector."""
        if self.slow is None:
            return {}
        if self.training:
            self.slow.follow(self.projector, value_at(self.config.momentum, pairs.clock))
        found = {}
        for name in self.config.teacher_views:
            weight = pairs.view_weights(name)
            made = self.slow(pairs.view(name).to(pairs.dtype), weight, workers)
            found[name] = unit(made.where((weight > 0)[:, None], 0))
        return found

    def clamp_(self) -> None:
        self.inner.clamp_()
