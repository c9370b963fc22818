"""What supervised objectives share: every view of every sample is an anchor, and labels say which others are positives.

A label below 0 is unknown: such a sample has its own other views as positives and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import combinations_with_replacement

from pydantic import Field
from torch import Tensor

from cl.engine.reduction import Over
from cl.engine.rule import Comparison, Reduction, Samples, Term, Tile, column_lse, column_sum, row_lse, row_sum
from cl.objectives.schedule import Scheduled
from cl.objectives.tiled import ScaledConfig, ScaledObjective, TiledConfig, TiledObjective

PROTOTYPES = "prototypes"  # the side of learnt vectors, one or more a class


class LabelledConfig(TiledConfig):
    label: str = Field("class", description="the label, int64 [B], by which samples belong together; below 0: unknown")


class LabelledObjective(TiledObjective):
    """Anchors are the embeddings of all views (one view is enough); candidates are all other embeddings of all views,
    and whatever `extra` names.
    """

    compares = "any number of views, or one"
    needs = ("class labels",)

    def __init__(self, config: LabelledConfig) -> None:
        super().__init__(config)
        self.label = config.label

    def labels(self) -> Collection[str]:
        return [self.label]

    def comparisons(self, views: Sequence[str]) -> Sequence[tuple[str, str] | Comparison]:
        further = [view for view in views if view in self.extra or view == PROTOTYPES]
        anchors = [view for view in views if view not in further]
        pairs = combinations_with_replacement(anchors, 2)
        return [*pairs, *((view, other) for view in anchors for other in further)]

    def positives(self, t: Tile) -> Tensor:
        """[R, C] bool: the same sample or the same class; candidates are not told apart from others here."""
        if t.columns.role == "negative":
            return t.positive
        row, column = t.row(self.label), t.column(self.label)
        return t.positive | (row == column) & (row >= 0)

    def lse(self, t: Tile, values: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> list[Reduction]:
        """log sum exp `values` [R, C] for every anchor of the tile."""
        rows = row_lse(values, over, mask)
        return [rows, column_lse(values, over, mask)] if self.columns_are_anchors(t) else [rows]

    def sum(self, t: Tile, values: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> list[Reduction]:
        """The sum of `values` [R, C] for every anchor of the tile."""
        rows = row_sum(values, over, mask)
        return [rows, column_sum(values, over, mask)] if self.columns_are_anchors(t) else [rows]

    def columns_are_anchors(self, t: Tile) -> bool:
        """Of two different views; within one view, rows have reduced everything already."""
        return t.row_view != t.column_view and t.column_view != PROTOTYPES and t.column_view not in self.extra


class ScaledLabelledConfig(LabelledConfig, ScaledConfig):
    """Fields of supervised objectives with one global temperature."""

    temperature: Scheduled = Field(0.1, description="initial temperature; scores are divided by it")


class ScaledLabelledObjective(LabelledObjective, ScaledObjective):
    """A supervised objective with one global temperature."""

    def __init__(self, config: ScaledLabelledConfig) -> None:
        super().__init__(config)


def each_anchor(s: Samples, loss: Callable[[str], tuple[Tensor, Tensor]]) -> list[Term]:
    """The mean over the anchors of all views: `loss(view)` is ([B] losses, [B] bool, which anchors have one)."""
    terms = []
    for view in s.present:
        values, some = loss(view)
        terms.append(Term(values, valid=s.valid(view) & some, factor=1 / len(s.present)))
    return terms
