"""Barlow Twins: the cross-correlation of two views becomes the identity.

    C_de = sum_i w_i a_id b_ie / sum_i w_i    of views standardised over the global batch
    L    = s [ sum_d (1 - C_dd)^2 + lambda sum_{d != e} C_de^2 ]

Zbontar et al. 2021, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", eq. 1 and 2. The standardisation
is that of a batch norm without scale and shift (variance + 1e-5). Used with a wide `projector`.
"""

from __future__ import annotations

from pydantic import Field

from cl.engine import moments
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES
from cl.objectives.moment import MomentConfig, MomentObjective
from cl.pairs import Pairs


class BarlowTwinsConfig(MomentConfig):
    off_diagonal: float = Field(0.0051, ge=0, description="lambda, the weight of the off-diagonal terms")
    scale: float = Field(1.0, gt=0, description="s, a factor of the whole loss (0.024 in the published code)")


@OBJECTIVES.register(
    "barlow-twins",
    "the cross-correlation of two views becomes the identity",
    paper="Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
)
class BarlowTwins(MomentObjective):
    """See the module's formula."""

    Config = BarlowTwinsConfig

    def __init__(self, config: BarlowTwinsConfig) -> None:
        super().__init__(config)
        self.off_diagonal, self.scale = config.off_diagonal, config.scale

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        rows = self.rows(pairs, workers)
        first, second = rows.views[:2]
        cross = moments.cross_covariance(first, second, rows.weight, workers, correction=0)
        spread = [
            moments.mean((view - moments.mean(view, rows.weight, workers)).square(), rows.weight, workers) + 1e-5
            for view in (first, second)
        ]
        correlation = cross * spread[0].rsqrt()[:, None] * spread[1].rsqrt()
        own = (1 - correlation.diagonal()).square().sum()
        others = correlation.square().sum() - correlation.diagonal().square().sum()
        loss = moments.replicated(self.scale * (own + self.off_diagonal * others), workers)
        return Outcome(loss, {"own_correlation": correlation.diagonal().mean().detach()})
