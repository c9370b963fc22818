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
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from cl.errors import DataError

Over = Literal["candidates", "negatives", "all"]


@dataclass(frozen=True)
class Reduction:
    """A value per tile entry [R, C], reduced along rows (to [R]) or columns (to [C]).

    `over` says which entries count: `candidates` (valid samples, other than repetitions of the row's own content),
    `negatives` (candidates without the row's own positive) or `all` (every valid pair of samples).
    """

    values: Tensor
    over: Over = "candidates"
    mask: Tensor | None = None  # [R, C] bool, narrows `over` further
    axis: Literal["row", "column"] = "row"
    kind: Literal["lse", "sum", "mean", "top"] = "lse"
    payload: Tensor | None = None  # mean: the values whose softmax-weighted mean is taken
    k: int = 0  # top: how many


def row_lse(values: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """log sum_j exp values_ij for each row; -inf where nothing counts."""
    return Reduction(values, over, mask)


def column_lse(values: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """log sum_i exp values_ij for each column."""
    return Reduction(values, over, mask, "column")


def row_sum(values: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """sum_j values_ij for each row; 0 where nothing counts."""
    return Reduction(values, over, mask, "row", "sum")


def column_sum(values: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """sum_i values_ij for each column."""
    return Reduction(values, over, mask, "column", "sum")


def row_mean(logits: Tensor, payload: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """sum_j softmax_j(logits)_ij payload_ij for each row; 0 where nothing counts."""
    return Reduction(logits, over, mask, "row", "mean", payload)


def column_mean(logits: Tensor, payload: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """sum_i softmax_i(logits)_ij payload_ij for each column."""
    return Reduction(logits, over, mask, "column", "mean", payload)


def row_top(values: Tensor, k: int, over: Over = "negatives", mask: Tensor | None = None) -> Reduction:
    """The k largest values of each row [R, k], descending, -inf where there are fewer; ties go to the first column."""
    return Reduction(values, over, mask, "row", "top", k=k)


@dataclass(frozen=True)
class Side:
    """One set of embeddings that tiles are made of, this worker's part of it, and what is known of its rows.

    Attributes:
        name: the view's name.
        embeddings: [n, D].
        sample: [n] int64, the global number of the sample that a row belongs to; -1 for none (queues, prototypes).
        weight: [n], 0 masks.
        content: [n, K] int64 or None.
        meta: name -> [n, ...], anything else a rule reads.
        replicated: every worker holds the same rows (queue, prototypes); they are not gathered.
    """

    name: str
    embeddings: Tensor
    sample: Tensor
    weight: Tensor
    content: Tensor | None = None
    meta: Mapping[str, Tensor] = field(default_factory=dict)
    replicated: bool = False


@dataclass(frozen=True)
class Known:
    """What is known of a slice of rows or columns: as in `Side`, and the statistics of earlier passes."""

    sample: Tensor
    weight: Tensor
    content: Tensor | None
    repeated: Tensor | None
    meta: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    masked: bool = True  # whether any weight of the whole side is 0


@dataclass
class Tile:
    """Rows x columns of one comparison: what `Rule.tile` sees.

    Attributes:
        scores: [R, C], inner products of the embeddings.
        row_view, column_view: names of the two views compared.
        rows, columns: what is known of them; `t.row("x")` and `t.column("x")` are shaped to broadcast.
    """

    scores: Tensor
    row_view: str
    column_view: str
    rows: Known
    columns: Known

    def row(self, name: str) -> Tensor:
        """A statistic of an earlier pass, a per-sample input or metadata of the rows, as [R, 1, ...]."""
        return _known(self.rows, name)[:, None]

    def column(self, name: str) -> Tensor:
        """The same of the columns, as [1, C, ...]."""
        return _known(self.columns, name)[None]

    @cached_property
    def own(self) -> Tensor:
        """[R, C] bool: row and column belong to the same sample (within one view: the row itself)."""
        return (self.rows.sample[:, None] == self.columns.sample) & (self.rows.sample >= 0)[:, None]

    @cached_property
    def valid(self) -> Tensor | None:
        """[R, C] bool: neither sample is masked, and within one view not the row itself; None where all are."""
        masks = []
        if self.row_view == self.column_view:
            masks.append(~self.own)
        if self.rows.masked:
            masks.append((self.rows.weight > 0)[:, None].expand(self.scores.shape))
        if self.columns.masked:
            masks.append((self.columns.weight > 0).expand(self.scores.shape))
        return _all(masks)

    @cached_property
    def candidates(self) -> Tensor | None:
        """[R, C] bool: `valid`, without repetitions of the row's own content; None where all are."""
        masks = [] if self.valid is None else [self.valid]
        if self.rows.content is not None and self.columns.content is not None:
            both = self.rows.repeated, self.columns.repeated
            if all(flags is None or bool(flags.any()) for flags in both):
                same = (self.rows.content[:, None] == self.columns.content).any(-1)
                masks.append(~same | self.own)
        return _all(masks)

    @cached_property
    def negatives(self) -> Tensor | None:
        """[R, C] bool: `candidates` without the row's own positive."""
        masks = [] if self.candidates is None else [self.candidates]
        return _all([*masks, ~self.own])

    def counts(self, reduction: Reduction) -> Tensor | None:
        """[R, C] bool: which entries of a reduction count; None for all of them."""
        over = {"candidates": "candidates", "negatives": "negatives", "all": "valid"}[reduction.over]
        masks = [mask for mask in (getattr(self, over), reduction.mask) if mask is not None]
        return _all([mask.expand(self.scores.shape) for mask in masks])


def _known(known: Known, name: str) -> Tensor:
    for source in (known.statistics, known.meta):
        if name in source:
            return source[name]
    available = ", ".join([*known.statistics, *known.meta]) or "nothing"
    raise DataError(f"A rule reads {name!r}, but the batch and the earlier passes have only {available}.")


def _all(masks: Sequence[Tensor]) -> Tensor | None:
    if not masks:
        return None
    result = masks[0]
    for mask in masks[1:]:
        result = result & mask
    return result


@dataclass(frozen=True)
class Samples:
    """The finished statistics of this worker's samples: what `Rule.finish` sees. Everything is [B, ...].

    Attributes:
        statistics: (name, view) -> [B].
        views: name -> embeddings [B, D], for what an objective computes within a sample.
        meta: what is known of the samples.
        prepared: what `Rule.prepare` returned.
    """

    statistics: Mapping[tuple[str, str], Tensor]
    views: Mapping[str, Tensor]
    meta: Mapping[str, Tensor]
    prepared: Mapping[str, Tensor]

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


@dataclass(frozen=True)
class Term:
    """One mean over the global batch: sum_i w_i values_i / sum_i w_i over the samples with `valid`, times `factor`."""

    values: Tensor  # [B]
    valid: Tensor | None = None  # [B] bool; None for all
    factor: float = 1.0


Reductions = Mapping[str, Reduction | Sequence[Reduction]]
Tiler = Callable[[Tile], Reductions]


class Rule(nn.Module):
    """Base of all rules; see the module's docstring.

    A rule whose second pass reads statistics of the first (by `t.row`, `t.column`) overrides `passes`. Statistics in
    `stopped` carry no gradient.
    """

    stopped: frozenset[str] = frozenset()

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        """Which views are compared, as (rows, columns); a pair is needed once, as a tile can reduce both ways."""
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
        raise TypeError(f"{type(self).__name__} must define finish(s).")

    def combine(self, means: Tensor) -> Tensor:
        """The loss from the global means of the terms [T]; by default their sum."""
        return means.sum()
