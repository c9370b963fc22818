"""Symmetric InfoNCE with a temperature for each direction.

    loss_i = [ logsumexp_j s_ij / tau_a - s_ii / tau_a  +  logsumexp_j s_ji / tau_b - s_ii / tau_b ] / 2

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", fig. 3, with tau_a for the
first view's anchors and tau_b for the second's, both learnt: pictures and captions are not equally ambiguous.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.rule import Reductions, Samples, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.temperature import Temperature
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class PerSideConfig(ScaledConfig):
    second_temperature: Scheduled | None = Field(None, description="of the second view's anchors; default: the same")


@OBJECTIVES.register(
    "infonce-per-side",
    "symmetric InfoNCE with a learnt temperature for each direction",
    paper="Learning Transferable Visual Models From Natural Language Supervision",
)
class InfoNCEPerSide(ScaledObjective):
    """See the module's formula. Parameters: the logs of both inverse temperatures."""

    Config = PerSideConfig

    def __init__(self, config: PerSideConfig) -> None:
        super().__init__(config)
        second = config.temperature if config.second_temperature is None else config.second_temperature
        self.second = Temperature(config.model_copy(update={"temperature": second}))

    def tile(self, t: Tile) -> Reductions:
        return {"lse": [row_lse(self.temperature() * t.scores), column_lse(self.second() * t.scores)]}

    def finish(self, s: Samples) -> Tensor:
        first, second = list(s.views)[:2]
        rest = s["lse", first] + s["lse", second]
        return (rest - (self.temperature() + self.second()) * s.own(first, second)) / 2

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        self.second.follow_(pairs.clock)
        return super().forward(pairs, workers)

    def measures(self) -> Mapping[str, Tensor]:
        return {**super().measures(), "second_logit_scale": self.second().detach()}

    def clamp_(self) -> None:
        super().clamp_()
        self.second.clamp_()
