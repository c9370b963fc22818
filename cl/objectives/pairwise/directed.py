"""Objectives that compare the first view with the second, in one direction or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from cl.engine.reduction import Reduction, column_lse, column_mean, column_sum, column_top, row_lse, row_mean, row_sum
from cl.engine.rule import Samples, row_top
from cl.objectives.tiled import ScaledConfig, ScaledObjective

_COLUMN: dict[Callable[..., Reduction], Callable[..., Reduction]] = {
    row_lse: column_lse,
    row_sum: column_sum,
    row_mean: column_mean,
    row_top: column_top,
}


class DirectedConfig(ScaledConfig):
    """Fields of scaled objectives with anchors of the first view, or of the first and the second."""

    direction: Literal["both", "forward"] = Field("both", description="forward: first view against second alone")


class DirectedObjective(ScaledObjective):
    """A scaled objective whose anchors are the first view (`forward`), or the mean over both views."""

    def __init__(self, config: DirectedConfig) -> None:
        super().__init__(config)
        self.both = config.direction == "both"

    def anchors(self, s: Samples) -> list[str]:
        """The views whose samples are anchors."""
        return list(s.views)[: 2 if self.both else 1]

    def each(self, reduce: Callable[..., Reduction], *values: object, **settings: object) -> list[Reduction]:
        """A reduction along rows, and along columns where both views are anchors."""
        rows = [reduce(*values, **settings)]
        return [*rows, _COLUMN[reduce](*values, **settings)] if self.both else rows
