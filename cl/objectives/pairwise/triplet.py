"""Triplet loss: the own pair must be closer than every negative, or than a mined one, by a margin.

    loss_i = [ margin + d(a_i, b_i) - d(a_i, b_j) ]_+    with [x]_+ = max(0, x), or softplus(x) for `soft`

    all        the mean over the triplets that cost anything
    hard       j: the closest negative
    semi-hard  j: the closest negative beyond the own pair, or the most distant one where there is none

Hermans, Beyer and Leibe 2017, "In Defense of the Triplet Loss for Person Re-Identification" (batch all, batch hard,
soft margin); Schroff, Kalenichenko and Philbin 2015, "FaceNet: A Unified Embedding for Face Recognition and
Clustering" (semi-hard).

d is the Euclidean distance, its square, or 1 - cosine. Negatives are the samples of all workers, and with `extra` the
mined ones. `all` is a mean over the triplets of the global batch (with `soft` every triplet costs something); the
others are means over anchors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from cl.engine.reduction import Reduction
from cl.engine.rule import Reductions, Samples, Term, Tile, column_sum, column_top, row_sum, row_top
from cl.objectives.base import OBJECTIVES
from cl.objectives.pairwise.distance import own_squared_distance, root, square_norms, squared_distances
from cl.objectives.tiled import TiledConfig, TiledObjective


class TripletConfig(TiledConfig):
    mining: Literal["all", "hard", "semi-hard"] = Field("hard", description="which negatives an anchor meets")
    distance: Literal["euclidean", "squared", "cosine"] = Field("euclidean", description="d")
    margin: float = Field(0.3, ge=0, description="by how much the own pair must be closer")
    soft: bool = Field(False, description="softplus instead of the hinge")
    direction: Literal["both", "forward"] = Field("both", description="forward: first view against second alone")
    same_side: bool = Field(False, description="other samples of the anchor's own view are negatives too")


@OBJECTIVES.register(
    "triplet",
    "the own pair closer than a negative by a margin: all triplets, the hardest, or semi-hard ones",
    paper="In Defense of the Triplet Loss for Person Re-Identification",
)
class Triplet(TiledObjective):
    """See the module's formula. It has no parameters."""

    Config: type[TripletConfig] = TripletConfig

    def __init__(self, config: TripletConfig) -> None:
        super().__init__(config)
        self.config = config
        self.both = config.direction == "both"

    def anchors(self, names: Sequence[str]) -> list[str]:
        """The views whose samples are anchors."""
        return list(names)[: 2 if self.both else 1]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        first, second = views[:2]
        sides = [(view, view) for view in self.anchors(views)] if self.config.same_side else []
        return [(first, second), *sides, *((first, name) for name in self.extra)]

    def hinge(self, value: Tensor) -> Tensor:
        """[x]_+"""
        return -logsigmoid(-value) if self.config.soft else value.relu()

    def distances(self, t: Tile) -> Tensor:
        """[R, C]: d."""
        if self.config.distance == "cosine":
            return 1 - t.scores
        squared = squared_distances(t)
        return squared if self.config.distance == "squared" else root(squared)

    def own(self, s: Samples) -> Tensor:
        """[B]: d of the own pairs."""
        first, second = list(s.views)[:2]
        if self.config.distance == "cosine":
            return 1 - s.own(first, second)
        squared = own_squared_distance(s, first, second)
        return squared if self.config.distance == "squared" else root(squared)

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        own = self.own(s)
        norms = {} if self.config.distance == "cosine" else square_norms(s, s.views)
        return {**norms, **{("own", view): own for view in self.anchors(list(s.views))}}

    def tile(self, t: Tile) -> Reductions:
        distance = self.distances(t)
        found = self.along(t.row("own"), distance, "row")
        if not self.both or t.row_view == t.column_view or t.column_view in self.extra:
            return found
        columns = self.along(t.column("own"), distance, "column")
        return {name: [reduction, columns[name]] for name, reduction in found.items()}

    def along(self, own: Tensor, distance: Tensor, axis: Literal["row", "column"]) -> dict[str, Reduction]:
        """What anchors with these distances `own` learn of one tile."""
        top, total = (row_top, row_sum) if axis == "row" else (column_top, column_sum)
        if self.config.mining == "hard":
            return {"closest": top(-distance, 1)}
        if self.config.mining == "semi-hard":
            return {"beyond": top(-distance, 1, mask=distance > own), "furthest": top(distance, 1)}
        cost = self.config.margin + own - distance
        return {
            "cost": total(self.hinge(cost), over="negatives"),
            "count": total(
                (cost > 0).to(cost.dtype) if not self.config.soft else torch.ones_like(cost), over="negatives"
            ),
        }

    def finish(self, s: Samples) -> list[Term]:
        anchors = self.anchors(list(s.views))
        if self.config.mining == "all":
            costs = [Term(s["cost", view], s.valid(view)) for view in anchors]
            return [*costs, *(Term(s["count", view], s.valid(view)) for view in anchors)]
        own, terms = self.own(s), []
        for view in anchors:
            if self.config.mining == "hard":
                distance = -s["closest", view][:, 0]
            else:
                beyond, furthest = -s["beyond", view][:, 0], s["furthest", view][:, 0]
                distance = beyond.where(beyond.isfinite(), furthest)
            some = distance.isfinite()
            cost = self.hinge(self.config.margin + own - distance.where(some, 0))
            terms.append(Term(cost, some, factor=1 / len(anchors)))
        return terms

    def combine(self, means: Tensor) -> Tensor:
        if self.config.mining != "all":
            return means.sum()
        costs, counts = means.view(2, -1)
        return costs.sum() / counts.sum().where(counts.sum() > 0, torch.ones_like(counts.sum()))


class SemiHardConfig(TripletConfig):
    mining: Literal["all", "hard", "semi-hard"] = Field("semi-hard", description="which negatives an anchor meets")
    distance: Literal["euclidean", "squared", "cosine"] = Field("squared", description="d")
    margin: float = Field(0.2, ge=0, description="by how much the own pair must be closer")


@OBJECTIVES.register(
    "triplet-semi-hard",
    "triplet loss on the closest negative beyond the own pair (FaceNet)",
    paper="FaceNet: A Unified Embedding for Face Recognition and Clustering",
)
class SemiHardTriplet(Triplet):
    """See the module's formula."""

    Config = SemiHardConfig


class AllTripletsConfig(TripletConfig):
    mining: Literal["all", "hard", "semi-hard"] = Field("all", description="which negatives an anchor meets")


@OBJECTIVES.register(
    "triplet-all",
    "triplet loss as a mean over all triplets of the global batch that cost anything (batch all)",
    paper="In Defense of the Triplet Loss for Person Re-Identification",
)
class AllTriplets(Triplet):
    """See the module's formula."""

    Config = AllTripletsConfig
