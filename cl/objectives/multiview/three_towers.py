"""Three Towers: image and text towers learn from each other and from a frozen third tower, through projections.

    loss = 1/3 [ clip(f, g) + clip(P_f f, Q_f h) + clip(P_g g, Q_g h) ]

Kossen et al. 2023, "Three Towers: Flexible Contrastive Learning with Pretrained Image Models", section 3: f and g are the
first two views, h the third (a frozen teacher's embedding, cached or computed); P and Q are linear, their results are
normalised; clip is symmetric InfoNCE. The third tower and all projections are dropped after training. One temperature is
shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.rule import Reductions, Samples, Term, Tile, column_lse, row_lse
from cl.errors import ConfigError, DataError
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class ThreeTowersConfig(ScaledConfig):
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")
    third_dimensions: int | None = Field(None, ge=1, description="of the third view; default: as the others")


@OBJECTIVES.register(
    "three-towers",
    "image and text against each other and, through projections, against a frozen third tower",
    paper="Three Towers: Flexible Contrastive Learning with Pretrained Image Models",
)
class ThreeTowers(ScaledObjective):
    """See the module's formula. Parameters: four linear layers, and the log of the inverse temperature."""

    Config = ThreeTowersConfig
    needs = ("three views",)

    def __init__(self, config: ThreeTowersConfig) -> None:
        super().__init__(config)
        if config.dimensions is None:
            raise ConfigError("Three towers need the field dimensions: the size of the embeddings.")
        width, third = config.dimensions, config.third_dimensions or config.dimensions
        self.own = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.third = nn.ModuleList([nn.Linear(third, width) for _ in range(2)])

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        names = list(self.view_names or pairs.views)
        if len(names) != 3:
            raise DataError(f"Three towers compare three views, but there are {len(names)}: {', '.join(names)}.")
        views = {name: pairs.view(name) for name in names[:2]}
        present = {name: value for name, value in pairs.present.items() if name in views}
        for number, name in enumerate(names[:2]):
            for side, layer in ((name, self.own[number]), (names[2], self.third[number])):
                key = _projected(side, name)
                # A masked sample may hold anything, which must not reach the layer's gradient.
                alive = (pairs.view_weights(side) > 0)[:, None]
                views[key] = normalize(layer(pairs.view(side).where(alive, 0)), dim=1)
                if side in pairs.present:
                    present[key] = pairs.present[side]
        return super().forward(replace(pairs, views=views, present=present), workers)
