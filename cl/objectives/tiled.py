"""Objectives that are a rule on a tile: everything but the rule is done here, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from cl.config import Config
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.rule import Rule
from cl.engine.sweep import Exchange, Tiling
from cl.engine.tiles import evaluate, sides_of
from cl.objectives.base import Objective
from cl.objectives.temperature import Temperature, TemperatureConfig
from cl.pairs import Pairs


class TiledConfig(Config):
    """Fields of every objective that is evaluated tile by tile."""

    views: list[str] | None = Field(None, description="the views to compare, in order; default: all of the batch")
    exchange: Exchange = Field("gather", description="how candidates of other workers are seen; local: not at all")
    tile_rows: int = Field(256, ge=1, description="anchors a tile")
    tile_columns: int = Field(2048, ge=1, description="candidates a tile")


class TiledObjective(Objective, Rule):
    """An objective whose subclass defines `tile` and `finish` (see `cl.engine.rule`)."""

    def __init__(self, config: TiledConfig) -> None:
        super().__init__()
        self.exchange: Exchange = config.exchange
        self.tiling = Tiling(config.tile_rows, config.tile_columns)
        self.view_names: Sequence[str] | None = config.views

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        names = self.view_names or list(pairs.views)
        views = {name: pairs.view(name) for name in names}
        first = views[names[0]]
        weight = pairs.weights(torch.float64 if first.dtype == torch.float64 else torch.float32)
        layout = workers.layout(len(pairs), first.device)
        sides = sides_of(views, layout, weight, content=pairs.content_columns())
        loss, _ = evaluate(self, sides, workers, self.exchange, self.tiling)
        return Outcome(loss, dict(self.measures()))

    def measures(self) -> Mapping[str, Tensor]:
        """Numbers for the log: the objective's own parameters, detached."""
        return {}


class ScaledConfig(TiledConfig, TemperatureConfig):
    """Fields of tiled objectives with one global temperature."""


class ScaledObjective(TiledObjective):
    """A tiled objective with one global temperature, which it logs and keeps in range."""

    def __init__(self, config: ScaledConfig) -> None:
        super().__init__(config)
        self.temperature = Temperature(config)

    def measures(self) -> Mapping[str, Tensor]:
        return {"logit_scale": self.temperature().detach()}

    def clamp_(self) -> None:
        self.temperature.clamp_()
