"""What objectives of this family share: two views, both directions or one, negatives across views or within as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Comparison, Reduction, Samples, Term, Tile, column_sum, row_sum
from cl.objectives.tiled import ScaledConfig, ScaledObjective


class SidesConfig(ScaledConfig):
    direction: Literal["both", "forward"] = Field("both", description="forward: first view against second alone")
    same_side: bool = Field(False, description="candidates of the anchor's own view count as well (two pictures)")


class Sides(ScaledObjective):
    """Anchors of the first view, or of both; each has a loss of its own, and the mean over directions is the loss."""

    def __init__(self, config: SidesConfig) -> None:
        super().__init__(config)
        self.both, self.same_side = config.direction == "both", config.same_side

    def comparisons(self, views: Sequence[str]) -> Sequence[tuple[str, str] | Comparison]:
        first, second = views[:2]
        found: list[tuple[str, str] | Comparison] = [(first, second), *((first, name) for name in self.extra)]
        if self.same_side:
            found += [(first, first), *([(second, second)] if self.both else [])]
        return found

    def anchors(self, s: Samples) -> list[str]:
        return list(s.views)[: 2 if self.both else 1]

    def ways(self, t: Tile, rows: Reduction, columns: Reduction) -> list[Reduction]:
        """By row, and by column where columns are anchors; within one view every pair is met from both sides."""
        across = t.row_view != t.column_view and t.columns.role == "view"
        return [rows, columns] if self.both and across else [rows]

    def count(self, t: Tile) -> list[Reduction]:
        """How many negatives an anchor has."""
        ones = torch.ones_like(t.scores)
        return self.ways(t, row_sum(ones, "negatives"), column_sum(ones, "negatives"))

    def positive(self, s: Samples) -> Tensor:
        """[B]: the scaled score of each own pair."""
        return self.temperature() * s.own(*list(s.views)[:2])

    def mean(self, s: Samples, losses: Sequence[Tensor], valid: Sequence[Tensor] | None = None) -> list[Term]:
        """The mean over directions; each a mean over its `valid` samples of those that have both views."""
        complete = s.valid(*list(s.views)[:2])
        valid = valid or [torch.ones_like(complete)] * len(losses)
        return [Term(loss, complete & some, 1 / len(losses)) for loss, some in zip(losses, valid, strict=True)]
