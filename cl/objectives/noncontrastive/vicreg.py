"""VICReg: views agree, every dimension varies, no two dimensions say the same.

    L = i mean_i |a_i - b_i|^2 / D  +  v/2 sum_views mean_d max(0, 1 - sqrt(var_d + eps))
        +  c sum_views sum_{d != e} Cov_de^2 / D

Bardes, Ponce and LeCun 2022, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", eq.
1 to 6, with the halved variance term of the published code; i, v, c = 25, 25, 1; eps = 1e-4; variance and covariance
over N - 1. Used with a wide `projector`: embeddings of length 1 vary by 1 / D a dimension.
"""

from __future__ import annotations

import torch
from pydantic import Field

from cl.engine import moments
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES
from cl.objectives.moment import MomentConfig, MomentObjective
from cl.pairs import Pairs


class VICRegConfig(MomentConfig):
    invariance: float = Field(25.0, ge=0, description="weight of the distance between views")
    variance: float = Field(25.0, ge=0, description="weight of the hinge on each dimension's standard deviation")
    covariance: float = Field(1.0, ge=0, description="weight of the covariance between dimensions")
    target: float = Field(1.0, gt=0, description="standard deviation that each dimension should have")


@OBJECTIVES.register(
    "vicreg",
    "views agree, dimensions vary and are not correlated",
    paper="VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
)
class VICReg(MomentObjective):
    """See the module's formula."""

    Config = VICRegConfig

    def __init__(self, config: VICRegConfig) -> None:
        super().__init__(config)
        self.config = config

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        rows = self.rows(pairs, workers)
        first, second = rows.views[:2]
        apart = rows.mean((first - second).square().mean(1), workers)
        spread, redundancy = apart.new_zeros(()), apart.new_zeros(())
        for view in (first, second):
            covariance = moments.covariance(view, rows.weight, workers, correction=1)
            deviation = (covariance.diagonal() + 1e-4).sqrt()
            spread = spread + torch.relu(self.config.target - deviation).mean() / 2
            squares = covariance.square()
            redundancy = redundancy + (squares.sum() - squares.diagonal().sum()) / len(covariance)
        loss = self.config.invariance * apart + self.config.variance * spread + self.config.covariance * redundancy
        metrics = {"invariance": apart, "variance": spread, "covariance": redundancy}
        return Outcome(moments.replicated(loss, workers), {name: value.detach() for name, value in metrics.items()})
