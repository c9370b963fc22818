"""DCLW: decoupled contrastive learning in which a positive that is far away pulls harder.

    loss_i = sum over both views of (logsumexp over negatives of the anchor - w_i l_ii) / 2
    w_i    = 2 - exp(<a_i, b_i> / sigma) / mean_k exp(<a_k, b_k> / sigma)

Yeh et al. 2022, "Decoupled Contrastive Learning", eq. 6 and below: the weight is a negative von Mises-Fisher function
of the pair. Negatives are both views of all other samples; `same_side: false` leaves those of the anchor's own view
out. The mean runs over all workers' samples. The weight is constant in the gradient unless `stop_weight: false`.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.tiled import ScaledConfig, ScaledObjective


class WeightedDecoupledConfig(ScaledConfig):
    temperature: Scheduled = Field(0.1, description="initial temperature; scores are divided by it")
    sigma: float = Field(0.5, ge=0.05, description="concentration of the weight; large: all weights 1")
    same_side: bool = Field(True, description="other samples of the anchor's own view are negatives too")
    stop_weight: bool = Field(True, description="no gradient through the weight")


@OBJECTIVES.register(
    "dclw",
    "decoupled contrastive learning with a von Mises-Fisher weight on the positive",
    paper="Decoupled Contrastive Learning",
)
class WeightedDecoupled(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = WeightedDecoupledConfig

    def __init__(self, config: WeightedDecoupledConfig) -> None:
        super().__init__(config)
        self.config = config

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        first, second = views[:2]
        return [(first, second), *([(first, first), (second, second)] if self.config.same_side else [])]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        rows = row_lse(logits, over="negatives")
        return {"rest": rows if t.row_view == t.column_view else [rows, column_lse(logits, over="negatives")]}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        own = s.own(first, second)
        rest = (s["rest", first] + s["rest", second]) / 2
        valid = rest.isfinite()
        pull = own.detach() if self.config.stop_weight else own
        # A constant factor cancels in the weight; this one keeps the exponent at or below 0.
        share = ((pull - 1) / self.config.sigma).exp()
        positive = self.temperature() * own
        return [Term(value, valid) for value in (rest - 2 * positive, share * positive, share)]

    def combine(self, means: Tensor) -> Tensor:
        plain, weighted, share = means
        return plain + weighted / share.where(share > 0, 1)
