"""Three Towers: image and text towers learn from each other and from a frozen third tower, through projections.

    loss = 1/3 [ clip(f, g) + clip(P_f f, Q_f h) + clip(P_g g, Q_g h) ]

Kossen et al. 2023, "Three Towers: Flexible Contrastive Learning with Pretrained Image Models": f and g are
the first two views, h the third (a frozen teacher's embedding, cached or computed); P and Q are linear, their results
are normalised; clip is symmetric InfoNCE. The third tower and all projections are dropped after training. One
temperature is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field
from torch import nn

from cl.engine.collectives import Layout
from cl.engine.normalise import unit
from cl.engine.rule import Reductions, Samples, Term, Tile, column_lse, row_lse
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES
from cl.objectives.multiview.views import ManyViewsConfig, ManyViewsObjective
from cl.pairs import Pairs


class ThreeTowersConfig(ManyViewsConfig):
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")
    third_dimensions: int | None = Field(None, ge=1, description="of the third view; default: as the others")


@OBJECTIVES.register(
    "three-towers",
    "image and text against each other and, through projections, against a frozen third tower",
    paper="Three Towers: Flexible Contrastive Learning with Pretrained Image Models",
)
class ThreeTowers(ManyViewsObjective):
    """See the module's formula. Parameters: four linear layers, and the log of the inverse temperature."""

    Config = ThreeTowersConfig
    compares = "three views, the third frozen"

    def __init__(self, config: ThreeTowersConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None  # filled in by `build`
        width, third = config.dimensions, config.third_dimensions or config.dimensions
        self.own = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.third = nn.ModuleList([nn.Linear(third, width) for _ in range(2)])

    def derive(self, pairs: Pairs, layout: Layout) -> Pairs:
        """The first two views, and for each its projection and that of the third."""
        pairs = super().derive(pairs, layout)
        if len(pairs.views) != 3:
            raise DataError(f"Three towers compare three views, but there are {len(pairs.views)}: {list(pairs.views)}.")
        *names, third = pairs.views
        views = {name: pairs.views[name] for name in names}
        present = {name: mask for name, mask in pairs.present.items() if name in views}
        for number, name in enumerate(names):
            for side, layer in ((name, self.own[number]), (third, self.third[number])):
                projection = f"{side} for {name if side == third else third}"
                # A masked sample may hold anything, which must not reach the gradient of the layer.
                alive = (pairs.view_weights(side) > 0)[:, None]
                views[projection] = unit(layer(pairs.views[side].where(alive, 0))).to(pairs.views[side].dtype)
                if side in pairs.present:
                    present[projection] = pairs.present[side]
        return replace(pairs, views=views, present=present)

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        """In the order of `derive`: both towers, and each tower's projection with the third's."""
        return [(views[0], views[1]), (views[2], views[3]), (views[4], views[5])]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        return {"lse": [row_lse(logits), column_lse(logits)]}

    def finish(self, s: Samples) -> list[Term]:
        terms = []
        for first, second in self.comparisons(list(s.present)):
            loss = (s["lse", first] + s["lse", second]) / 2 - self.temperature() * s.own(first, second)
            terms.append(Term(loss, s.valid(first, second), factor=1 / 3))
        return terms
