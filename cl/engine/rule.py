"""The rule contract: what an objective says about one tile of similarities.

A rule is a module with two methods in ordinary PyTorch:

    tile(t)    from a tile of scores [R, C] to *reductions* along rows or columns: log-sum-exp, sum, tilted mean, top-k
    finish(s)  from the finished statistics of each local sample [B] to its loss [B]

The engine evaluates `tile` over all columns of all workers and again in backward, so a rule never sees more than a
tile, never a worker and never a factor of the world size. CLIP, for example:

    def tile(self, t):
        logits = self.temperature() * t.scores
        return {"lse": [row_lse(logits), column_lse(logits)]}

    def finish(self, s):
        return (s["lse", "image"] + s["lse", "text"]) / 2 - self.temperature() * s.own("image", "text")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cl.engine.reduction import (
    Reduction,
    Reductions,
    column_lse,
    column_mean,
    column_sum,
    column_top,
    row_lse,
    row_mean,
    row_sum,
    row_top,
)
from cl.engine.side import Known
from cl.engine.tile import Tile
from cl.errors import DataError
from cl.pairs import Clock

__all__ = [
    "Comparison",
    "Known",
    "Reduction",
    "Reductions",
    "Rule",
    "Samples",
    "Term",
    "Tile",
    "Tiler",
    "column_lse",
    "column_mean",
    "column_sum",
    "column_top",
    "row_lse",
    "row_mean",
    "row_sum",
    "row_top",
]

Tiler = Callable[[Tile], Reductions]
Score = Callable[[Tensor, Tensor, Known, Known], Tensor]


class Comparison(NamedTuple):
    """Which views are compared, and how.

    Attributes:
        rows, columns: names of the two views.
        channels: name -> (row view, column view) of the same samples, whose scores a tile has beside its own: a
            teacher's, an augmentation's. One that nobody trains costs no product in backward.
        score: differentiable function of row embeddings [R, ...], column embeddings [C, ...] and what is known of
            both, to scores [R, C]; None for inner products, which the engine differentiates by itself.
        cost: numbers that `score` holds for each entry of a tile; tiles shrink accordingly.
    """

    rows: str
    columns: str
    channels: Mapping[str, tuple[str, str]] = {}
    score: Score | None = None
    cost: int = 1


@dataclass(frozen=True)
class Samples:
    """The finished statistics of this worker's samples: what `Rule.finish` sees. Everything is [B, ...].

    Attributes:
        statistics: (name, view) -> [B].
        views: name -> embeddings [B, D], for what an objective computes within a sample.
        meta: what is known of the samples: "weight", "sample", "key" and the labels.
        present: view -> [B] bool, which samples have it and are not masked.
        prepared: what `Rule.prepare` returned.
        clock: where in the run this step is.
    """

    statistics: Mapping[tuple[str, str], Tensor]
    views: Mapping[str, Tensor]
    meta: Mapping[str, Tensor]
    present: Mapping[str, Tensor]
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def __getitem__(self, key: str | tuple[str, str]) -> Tensor:
        """A statistic by (name, view), or by name where only one view has it."""
        if isinstance(key, tuple):
            return self.statistics[key]
        found = [value for (name, _), value in self.statistics.items() if name == key]
        if len(found) != 1:
            raise DataError(f"Statistic {key!r} exists for {len(found)} views; ask for one by (name, view).")
        return found[0]

    def own(self, first: str, second: str) -> Tensor:
        """[B]: inner product of each sample's embeddings in two views."""
        left, right = self.views[first], self.views[second]
        kind = torch.float32 if left.dtype in (torch.bfloat16, torch.float16) else left.dtype
        return (left.to(kind) * right.to(kind)).sum(1)

    def valid(self, *views: str) -> Tensor:
        """[B] bool: the sample has all of these views; of all views if none is named."""
        masks = [self.present[view] for view in views or self.present]
        return torch.stack(masks).all(0)


@dataclass(frozen=True)
class Term:
    """One mean over the global batch: sum_i w_i values_i / sum_i w_i over the samples with `valid`, times `factor`."""

    values: Tensor  # [B]
    valid: Tensor | None = None  # [B] bool; None for the samples that have every view
    factor: float = 1.0


class Rule(nn.Module):
    """Base of all rules; see the module's docstring.

    A rule whose second pass reads statistics of the first (by `t.row`, `t.column`) overrides `passes`. Statistics in
    `stopped` carry no gradient into the passes that read them.
    """

    stopped: frozenset[str] = frozenset()

    def comparisons(self, views: Sequence[str]) -> Sequence[tuple[str, str] | Comparison]:
        """Which views are compared, as (rows, columns) or `Comparison`; a pair is needed once, as a tile can reduce
        both ways.
        """
        return [(views[0], views[1])]

    def learnt(self) -> Sequence[Tensor]:
        """The tensors besides embeddings that receive a gradient; by default the rule's parameters."""
        return list(self.parameters())

    def passes(self) -> Sequence[Tiler]:
        """The sweeps over all tiles, in order."""
        return [self.tile]

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        """Differentiable values of each local sample, (name, view) -> [B], that tiles read on both sides: temperatures
        of samples, margins, gates. `s` has no statistics yet.
        """
        return {}

    def tile(self, t: Tile) -> Reductions:
        """Reductions by name. Reductions of the same name and view add up over comparisons and tiles: a row reduction
        belongs to the tile's row view, a column reduction to its column view.
        """
        raise TypeError(f"{type(self).__name__} must define tile(t).")

    def prepare(self, s: Samples) -> Mapping[str, Tensor]:
        """State that changes once a step (moving averages, queues): called between forward and backward, without
        gradient, never again for the same step. What it returns is `s.prepared` in `finish`.
        """
        return {}

    def finish(self, s: Samples) -> Tensor | Sequence[Term]:
        """Each local sample's loss [B], a mean over the samples that have every view; or terms with means of their
        own.
        """
        raise TypeError(f"{type(self).__name__} must define finish(s).")

    def combine(self, means: Tensor) -> Tensor:
        """The loss from the global mean of each term [T]; their sum, unless a rule is a function of the means."""
        return means.sum()
