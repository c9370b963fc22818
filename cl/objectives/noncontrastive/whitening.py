"""W-MSE: views agree after whitening, which spreads the batch over a sphere.

    v_i = L^-1 (x_i - mean),  L L^T = (1 - eps) Cov + eps I    over both views of the global batch
    L   = mean_i | v_i / |v_i| - v'_i / |v'_i| |^2

Ermolov et al. 2021, "Whitening for Self-Supervised Representation Learning", eq. 1 to 5 (Cholesky, the normalised
distance). The batch must hold more samples than there are dimensions.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from cl.engine import moments
from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES
from cl.objectives.moment import MomentConfig, MomentObjective
from cl.pairs import Pairs


class WhiteningConfig(MomentConfig):
    eps: float = Field(1e-3, gt=0, lt=1, description="share of the identity in the covariance that is inverted")


@OBJECTIVES.register(
    "w-mse",
    "views agree after whitening over the global batch",
    paper="Whitening for Self-Supervised Representation Learning",
)
class WhiteningMSE(MomentObjective):
    """See the module's formula."""

    Config = WhiteningConfig

    def __init__(self, config: WhiteningConfig) -> None:
        super().__init__(config)
        self.eps = config.eps

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        rows = self.rows(pairs, workers)
        first, second = rows.views[:2]
        both, weight = torch.cat([first, second]), rows.weight.repeat(2)
        factor = cholesky(moments.covariance(both, weight, workers, correction=1), self.eps)
        centre = moments.mean(both, weight, workers)
        left, right = (
            unit(torch.linalg.solve_triangular(factor, (v - centre).T, upper=False).T) for v in (first, second)
        )
        loss = rows.mean((left - right).square().sum(1), workers)
        return Outcome(moments.replicated(loss, workers))


def cholesky(covariance: Tensor, eps: float) -> Tensor:
    """The lower factor of (1 - eps) Cov + eps I."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky((1 - eps) * covariance + eps * identity)
