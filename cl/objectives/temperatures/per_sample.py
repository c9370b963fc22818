"""Symmetric InfoNCE with a temperature for each sample, predicted from its embedding.

    tau_i  = tau_min + (tau_max - tau_min) sigmoid(w . e_i + b)
    loss_i = [ logsumexp_j (s_ij - s_ii) / tau_i + rho tau_i ] / 2  for each side's anchors, summed over both

Qiu et al. 2024, "To Cool or not to Cool? Temperature Network Meets Large Foundation Models via DRO": rho tau is
what keeps the temperature of the robust objective from growing without bound; the network here is one linear layer a
side. Qiu et al. 2023 ("Not All Semantics are Created Equal") keep a temperature for each sample as state instead:
`isogclr`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cl.engine.rule import Reductions, Samples, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import TiledConfig, TiledObjective


class PerSampleConfig(TiledConfig):
    least: float = Field(0.01, gt=0, description="tau_min")
    greatest: float = Field(0.1, gt=0, description="tau_max")
    rho: float = Field(8.0, ge=0, description="weight of the temperature itself")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")

    @model_validator(mode="after")
    def _ordered(self) -> PerSampleConfig:
        if self.least > self.greatest:
            raise ValueError(f"least ({self.least}) must not be more than greatest ({self.greatest})")
        return self


@OBJECTIVES.register(
    "infonce-per-sample",
    "symmetric InfoNCE with a temperature that is predicted from each sample's embedding (TempNet)",
    paper="To Cool or not to Cool? Temperature Network Meets Large Foundation Models via DRO",
)
class InfoNCEPerSample(TiledObjective):
    """See the module's formula. Parameters: w and b of both sides."""

    Config = PerSampleConfig

    def __init__(self, config: PerSampleConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None
        self.least, self.greatest, self.rho = config.least, config.greatest, config.rho
        self.predict = nn.ModuleList(nn.Linear(config.dimensions, 1) for _ in range(2))

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        first, second = list(s.views)[:2]
        return {
            (name, view): value
            for view, predict in zip((first, second), self.predict, strict=True)
            for name, value in (("tau", self._tau(predict, s.views[view])), ("own", s.own(first, second)))
        }

    def _tau(self, predict: nn.Module, view: Tensor) -> Tensor:
        rows = view.to(torch.promote_types(view.dtype, torch.float32))
        return self.least + (self.greatest - self.least) * predict(rows)[:, 0].sigmoid()

    def tile(self, t: Tile) -> Reductions:
        by_row = (t.scores - t.row("own")) / t.row("tau")
        by_column = (t.scores - t.column("own")) / t.column("tau")
        return {"lse": [row_lse(by_row), column_lse(by_column)]}

    def finish(self, s: Samples) -> Tensor:
        first, second = list(s.views)[:2]
        sides = [s["lse", view] + self.rho * s["tau", view] for view in (first, second)]
        return (sides[0] + sides[1]) / 2
