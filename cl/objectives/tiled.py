"""Objectives that are a rule on a tile: everything but the rule is done here, once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from cl.config import Config
from cl.engine.collectives import Layout, Workers
from cl.engine.exchange import ExchangeChoice, Exchanger
from cl.engine.outcome import Outcome
from cl.engine.randomness import keys_of
from cl.engine.rule import Comparison, Rule
from cl.engine.side import Side, sides_of
from cl.engine.sweep import Tiling
from cl.engine.tiles import evaluate
from cl.errors import DataError
from cl.objectives.base import Objective
from cl.objectives.temperature import Temperature, TemperatureConfig
from cl.pairs import Pairs


class TiledConfig(Config):
    """Fields of every objective that is evaluated tile by tile."""

    views: list[str] | None = Field(None, description="the views to compare, in order; default: all of the batch")
    extra: list[str] = Field([], description="further embeddings to compare with, such as mined negatives, by name")
    exchange: ExchangeChoice = Field(
        "auto", description="how candidates of other workers are seen; local: not at all; auto: by size and memory"
    )
    tile_rows: int = Field(0, ge=0, description="anchors a tile; 0: by device")
    tile_columns: int = Field(0, ge=0, description="candidates a tile; 0: by device")


class TiledObjective(Objective, Rule):
    """An objective whose subclass defines `tile` and `finish` (see `cl.engine.rule`)."""

    def __init__(self, config: TiledConfig) -> None:
        super().__init__()
        self.exchanger = Exchanger(config.exchange)
        self.tiling = Tiling(config.tile_rows, config.tile_columns)
        self.view_names: Sequence[str] | None = config.views
        self.extra: Sequence[str] = config.extra

    def labels(self) -> Collection[str]:
        """The labels that `tile` reads of rows and columns."""
        return []

    def comparisons(self, views: Sequence[str]) -> Sequence[tuple[str, str] | Comparison]:
        """The first view against the second, and against whatever `extra` names."""
        return [(views[0], views[1]), *((views[0], name) for name in self.extra)]

    def constants(self, pairs: Pairs) -> list[Side]:
        """Sides that every worker holds alike: queues, prototypes (`replicated`)."""
        return []

    def derive(self, pairs: Pairs, layout: Layout) -> Pairs:
        """The batch as the rule sees it: by default the views that the config names; an objective may replace views or
        add such as it computes from them (projections, means, products), with labels of its own.
        """
        if self.view_names is None:
            return pairs
        views = {name: pairs.view(name) for name in self.view_names}
        tokens = {name: mask for name, mask in pairs.tokens.items() if name in views}
        return replace(pairs, views=views, tokens=tokens)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        layout = workers.layout(len(pairs), pairs.device)
        pairs = self.derive(pairs, layout)
        meta = {name: pairs.label(name) for name in self.labels()}
        if pairs.ids is not None:
            meta["key"] = keys_of(pairs.ids)
        views = self._view_sides(pairs, layout, meta)
        width = sum(side.embeddings.shape[1:].numel() for side in views)  # all are held from forward to backward
        exchange = self.exchanger(layout.total, width, views[0].embeddings.element_size(), workers)
        own = slice(None) if exchange != "local" else layout.local
        loss, _ = evaluate(
            self,
            [*views, *(_extra_side(name, pairs, views[0]) for name in self.extra), *self.constants(pairs)],
            workers,
            exchange,
            self.tiling,
            weight=pairs.weights(),
            meta={**pairs.labels, **meta},
            targets={name: value[:, own] for name, value in pairs.targets.items()},
            clock=pairs.clock,
        )
        return Outcome(loss, dict(self.measures()))

    def _view_sides(self, pairs: Pairs, layout: Layout, meta: Mapping[str, Tensor]) -> list[Side]:
        """The views of the batch, masked where a sample does not have them; token-wise ones of equal length."""
        sides = sides_of(pairs.views, layout, pairs.weights(), content=pairs.content_columns(), meta=meta)
        for number, side in enumerate(sides):
            name = side.name
            if name in pairs.present:
                side = replace(side, weight=pairs.view_weights(name))
            if side.embeddings.dim() == 3:
                embeddings, tokens = _same_length(side.embeddings, pairs.tokens.get(name), layout)
                side = replace(side, embeddings=embeddings, meta={**meta, "tokens": tokens})
            sides[number] = side
        return sides

    def measures(self) -> Mapping[str, Tensor]:
        """Numbers for the log: the objective's own parameters, detached."""
        return {}


def _same_length(tokens: Tensor, mask: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
    """Token embeddings [B, T, D] and their mask [B, T], padded to the longest of all workers."""
    mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
    longest = torch.tensor(tokens.shape[1], device=tokens.device)
    missing = int(layout.workers.all_reduce(longest, dist.ReduceOp.MAX)) - tokens.shape[1]
    return pad(tokens, (0, 0, 0, missing)), pad(mask, (0, missing))


def _extra_side(name: str, pairs: Pairs, samples: Side) -> Side:
    """The embeddings of `pairs.extra[name]` as columns that belong to their owners."""
    if name not in pairs.extra:
        have = ", ".join(pairs.extra) or "none"
        raise DataError(f"The objective compares with {name!r}, but the batch's further embeddings are: {have}.")
    extra = pairs.extra[name]
    weight = (pairs.weights()[extra.owner] > 0).to(pairs.dtype)
    if extra.weight is not None:
        weight = weight * extra.weight.to(weight)
    content = extra.content
    if content is None and extra.role == "positive" and samples.content is not None:
        content = samples.content[extra.owner]
    side = Side(name, extra.embeddings, samples.sample[extra.owner], weight, content)
    if extra.role == "negative":
        return replace(side, role="negative")
    # A further positive is whatever its owner is: of the same class, tags and group.
    return replace(side, meta={known: value[extra.owner] for known, value in samples.meta.items()})


class ScaledConfig(TiledConfig, TemperatureConfig):
    """Fields of tiled objectives with one global temperature."""


class ScaledObjective(TiledObjective):
    """A tiled objective with one global temperature, which it logs and keeps in range."""

    def __init__(self, config: ScaledConfig) -> None:
        super().__init__(config)
        self.temperature = Temperature(config)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        self.temperature.follow_(pairs.clock)
        return super().forward(pairs, workers)

    def measures(self) -> Mapping[str, Tensor]:
        return {"logit_scale": self.temperature().detach()}

    def clamp_(self) -> None:
        self.temperature.clamp_()
