"""SimSiam and BYOL: one view predicts the other; a predictor and a stopped gradient keep them from collapse.

    SimSiam   L = mean_i [ d(h(f a_i), sg f b_i) + d(h(f b_i), sg f a_i) ] / 2,         d(p, z) = - cos(p, z)
    BYOL      L = mean_i [ |h(f a_i) - sg t b_i|^2 + |h(f b_i) - sg t a_i|^2 ],         both of length 1

f is the projector, h the predictor, t the projector's moving average on the views of a teacher. Chen and He 2021,
"Exploring Simple Siamese Representation Learning", eq. 1 and 2; Grill et al. 2020, "Bootstrap Your Own Latent", eq. 1
and 2. BYOL needs teacher views (`teachers` of kind ema in the training config).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cl.engine import moments
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES
from cl.objectives.heads import Head
from cl.objectives.moment import MomentConfig, MomentObjective, Rows
from cl.objectives.moving import MovingAverage
from cl.objectives.schedule import Scheduled, value_at
from cl.pairs import Pairs


class SimSiamConfig(MomentConfig):
    projector: list[int] = Field([256, 256], description="widths of the projector; empty: none")
    predictor: list[int] = Field([64], description="hidden widths of the predictor; it ends at its input's width")


class BYOLConfig(SimSiamConfig):
    teacher_views: list[str] = Field(
        ["a_teacher", "b_teacher"],
        min_length=2,
        max_length=2,
        description="the teacher's views, in the order of `views`",
    )
    momentum: Scheduled = Field(0.996, description="of the projector's moving average; a number or a ramp")


@OBJECTIVES.register(
    "simsiam",
    "each view predicts the other, whose gradient is stopped",
    paper="Exploring Simple Siamese Representation Learning",
)
class SimSiam(MomentObjective):
    """See the module's formula."""

    Config = SimSiamConfig
    memory = "batch x dim"

    def __init__(self, config: SimSiamConfig) -> None:
        super().__init__(config)
        self.predictor = Head([self.width, *config.predictor, self.width])

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        rows = self.rows(pairs, workers)
        first, second = rows.views[:2]
        apart = (self.distance(first, second, rows, workers) + self.distance(second, first, rows, workers)) / 2
        return Outcome(moments.replicated(rows.mean(apart, workers), workers))

    def distance(self, view: Tensor, target: Tensor, rows: Rows, workers: Workers) -> Tensor:
        """[B]: minus the cosine of the prediction from `view` and `target`."""
        predicted = self.predictor(view, rows.weight, workers)
        return -cosine_similarity(predicted, target.detach(), dim=1, eps=1e-8)


@OBJECTIVES.register(
    "byol",
    "each view predicts what a moving average of the model makes of the other",
    paper="Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning",
)
class BYOL(SimSiam):
    """See the module's formula."""

    Config = BYOLConfig
    needs = ("teacher views",)
    state = ("the projector's moving average",)

    def __init__(self, config: BYOLConfig) -> None:
        super().__init__(config)
        self.teacher_views, self.momentum = config.teacher_views, config.momentum
        self.slow = MovingAverage(self.projector) if self.projector is not None else None

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        rows = self.rows(pairs, workers)
        first, second = rows.views[:2]
        left, right = self._targets(pairs, rows, workers)
        apart = 4 + 2 * (self.distance(first, right, rows, workers) + self.distance(second, left, rows, workers))
        return Outcome(moments.replicated(rows.mean(apart, workers), workers))

    def names(self, pairs: Pairs) -> list[str]:
        return [name for name in super().names(pairs) if name not in self.teacher_views]

    @torch.no_grad()
    def _targets(self, pairs: Pairs, rows: Rows, workers: Workers) -> list[Tensor]:
        alive = (rows.weight > 0)[:, None]
        views = [pairs.view(name).to(pairs.dtype).where(alive, 0) for name in self.teacher_views]
        if self.slow is None or self.projector is None:
            return views
        if self.training:
            self.slow.follow(self.projector, value_at(self.momentum, pairs.clock))
        return [self.slow(view, rows.weight, workers) for view in views]
