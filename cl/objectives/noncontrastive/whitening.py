"""W-MSE: views agree after whitening, which spreads the batch over a sphere.

    v_i = F^-1 (x_i - mean),  F F^T = (1 - eps) Cov + eps I    over the global batch, F lower triangular
    L   = mean_i | v_i / |v_i| - v'_i / |v'_i| |^2

Ermolov et al. 2021, "Whitening for Self-Supervised Representation Learning": Cholesky, the normalised distance. Each
view is whitened by its own moments, as in the authors' program (their slices of a batch hold one view), which also
removes what tells two modalities apart; with `apart: false` both by the moments of both. The batch must hold more
samples than there are dimensions.
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
    apart: bool = Field(True, description="each view by its own mean and covariance; false: by those of both views")
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
        self.apart, self.eps = config.apart, config.eps

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        rows = self.rows(pairs, workers)
        first, second = rows.views[:2]
        if self.apart:
            left, right = (self.whiten(view, rows.weight, workers) for view in (first, second))
        else:
            both = self.whiten(torch.cat([first, second]), rows.weight.repeat(2), workers)
            left, right = both.chunk(2)
        loss = rows.mean((unit(left) - unit(right)).square().sum(1), workers)
        return Outcome(moments.replicated(loss, workers))

    def whiten(self, rows: Tensor, weight: Tensor, workers: Workers) -> Tensor:
        """[B, D] with the unit matrix for covariance."""
        factor = cholesky(moments.covariance(rows, weight, workers, correction=1), self.eps)
        centred = rows - moments.mean(rows, weight, workers)
        return torch.linalg.solve_triangular(factor, centred.T, upper=False).T


def cholesky(covariance: Tensor, eps: float) -> Tensor:
    """The lower factor of (1 - eps) Cov + eps I."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    return torch.linalg.cholesky((1 - eps) * covariance + eps * identity)
