"""Symile: all modalities of a sample at once, by their multilinear inner product.

    s(x, y, z, ...) = 1/tau sum_d x_d y_d z_d ...
    loss_i          = 1/M sum_v -log( exp s_i / ( exp s_i + sum_{j != i} exp s(v_i, others of v at tuple j) ) )

Saporta et al. 2024, "Contrasting with Symile: Simple Model-Agnostic Representation Learning for Unlimited
Modalities": each modality v in turn is the anchor, s_i the score of the sample's own tuple; a negative
tuple has the other modalities of different samples, shuffled anew for each anchor modality and step (the paper's O(N)
sampling). Unlike sums of pairs it sees dependence that no pair shows; with two modalities and the tuples unshuffled
it would be CLIP.

Tuples are shuffled by seed, step and sample ids: the samples in a random order on a circle, each with its successor.
So they do not depend on how many workers there are. A tuple whose members all hold the anchor's content is no
negative. `shuffles` draws several sets of tuples.

`missing: skip` leaves samples that lack a modality out; `missing: learnt` puts a learnt vector in its place (for
which the config must name the `views`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import reduce
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cl.engine import randomness
from cl.engine.collectives import Layout, gather_rows
from cl.engine.normalise import unit
from cl.engine.randomness import keys_of
from cl.engine.rule import Reductions, Samples, Tile, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.multiview.views import ManyViewsConfig, ManyViewsObjective
from cl.objectives.schedule import Scheduled
from cl.pairs import Pairs

TUPLE = "others of "  # the name of a side of shuffled tuples: this, the anchor's view, and which shuffle
CONTENT = "symile content"  # label: what a sample holds; the label named as a tuple is what its members hold


class SymileConfig(ManyViewsConfig):
    # Products of three unit vectors are of the order of 1 over the dimensions, far smaller than cosines.
    temperature: Scheduled = Field(0.02, description="initial temperature; scores are divided by it")
    max_scale: float = Field(1000.0, gt=0, description="largest inverse temperature, kept after each step")
    shuffles: int = Field(1, ge=1, description="sets of shuffled tuples; each gives N - 1 negatives an anchor")
    seed: int = Field(0, description="of the shuffles")
    missing: Literal["skip", "learnt"] = Field(
        "skip", description="samples that lack a modality: left out, or with a learnt vector in its place"
    )
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")

    @model_validator(mode="after")
    def _views_for_vectors(self) -> Self:
        if self.missing == "learnt" and not self.views:
            raise ValueError("missing: learnt needs the field views: the modalities that have a vector")
        return self


@OBJECTIVES.register(
    "symile",
    "any number of modalities at once by their multilinear inner product, missing ones allowed",
    paper="Contrasting with Symile: Simple Model-Agnostic Representation Learning for Unlimited Modalities",
)
class Symile(ManyViewsObjective):
    """See the module's formula. Parameters: the log of the inverse temperature; a vector a modality if `learnt`."""

    Config = SymileConfig

    def __init__(self, config: SymileConfig) -> None:
        super().__init__(config)
        self.shuffles, self.seed = config.shuffles, config.seed
        self.tuples: list[str] = []  # the names of the sides of shuffled tuples, once `derive` knows the views
        self.absent = nn.ParameterDict()
        if config.missing == "learnt":
            assert config.views is not None
            assert config.dimensions is not None
            for view in config.views:
                self.absent[view] = nn.Parameter(torch.randn(config.dimensions))

    def derive(self, pairs: Pairs, layout: Layout) -> Pairs:
        pairs = self._filled(super().derive(pairs, layout))
        present = torch.stack([pairs.view_weights(view) > 0 for view in pairs.views]).all(0)
        place = torch.arange(layout.total, device=pairs.device)
        content = pairs.content_columns()
        content = place[layout.local, None] if content is None else content
        known = layout.gather(content)
        keys = place if pairs.ids is None else layout.gather(keys_of(pairs.ids))
        alive = layout.gather(present)
        rows = {view: gather_rows(value, layout) for view, value in pairs.views.items()}
        views, labels = dict(pairs.views), {**pairs.labels, CONTENT: content}
        self.tuples = []
        for anchor in pairs.views:
            for shuffle in range(self.shuffles):
                others = [view for view in rows if view != anchor]
                members = []
                for number, _ in enumerate(others):
                    seed = ((self.seed * 1009 + shuffle) * 1009 + list(rows).index(anchor)) * 1009 + number
                    members.append(successors(seed, pairs.clock.step, keys, alive)[layout.local])
                name = f"{TUPLE}{anchor} {shuffle}"
                chosen = (rows[view][at] for view, at in zip(others, members, strict=True))
                self.tuples.append(name)
                views[name] = reduce(torch.mul, chosen)
                labels[name] = torch.cat([known[at] for at in members], 1)
        return replace(pairs, views=views, labels=labels, present=dict.fromkeys(views, present))

    def _filled(self, pairs: Pairs) -> Pairs:
        """Zeros in the place of what masked samples hold, and the learnt vectors in the place of what is missing."""
        views, present = {}, dict(pairs.present)
        for view, value in pairs.views.items():
            kept = value.where((pairs.view_weights(view) > 0)[:, None], 0)
            if view in present and view in self.absent:
                absent = (pairs.weights() > 0) & ~present.pop(view)
                kept = torch.where(absent[:, None], unit(self.absent[view]).to(kept.dtype), kept)
            views[view] = kept
        return replace(pairs, views=views, present=present)

    def labels(self) -> Collection[str]:
        return [CONTENT, *self.tuples]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [
            (anchor, f"{TUPLE}{anchor} {shuffle}")
            for anchor in views
            if not anchor.startswith(TUPLE)
            for shuffle in range(self.shuffles)
        ]

    def tile(self, t: Tile) -> Reductions:
        own, members = t.row(CONTENT), t.column(t.column_view)
        members = members.unflatten(2, (-1, own.shape[2]))
        same = (own[:, :, None] == members).any(3).all(2)
        return {"rest": row_lse(self.temperature() * t.scores, over="all", mask=~(t.own | same))}

    def finish(self, s: Samples) -> Tensor:
        views = [view for view in s.present if not view.startswith(TUPLE)]
        own = self.temperature() * torch.stack([s.views[view] for view in views]).prod(0).sum(1)
        return torch.stack([torch.logaddexp(s["rest", view], own) - own for view in views]).mean(0)


def successors(seed: int, step: int, keys: Tensor, alive: Tensor) -> Tensor:
    """[N] int64: each sample's next one on a circle of those `alive` in random order; itself where it is alone."""
    lots = randomness.uniform(seed, step, keys, dtype=torch.float64).masked_fill(~alive, torch.inf)
    order = lots.argsort(stable=True)
    number = int(alive.sum())
    after = torch.arange(len(keys), device=keys.device)
    after[order[:number]] = order[:number].roll(-1)
    return after
