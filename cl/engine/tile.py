"""A tile: rows x columns of one comparison, and what a rule may ask about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from cl.engine import randomness
from cl.engine.reduction import Reduction
from cl.engine.side import Known
from cl.errors import DataError
from cl.pairs import Clock


@dataclass
class Tile:
    """Rows x columns of one comparison: what `Rule.tile` sees.

    Attributes:
        scores: [R, C], inner products of the embeddings, or what the comparison's own `score` gives.
        row_view, column_view: names of the two views compared.
        rows, columns: what is known of them; `t.row("x")` and `t.column("x")` are shaped to broadcast.
        channels: name -> [R, C], the scores of other views of the same samples that the comparison names.
        targets: name -> [R, C], from `Pairs.targets`.
        clock: where in the run this step is.
    """

    scores: Tensor
    row_view: str
    column_view: str
    rows: Known
    columns: Known
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def row(self, name: str) -> Tensor:
        """A statistic of an earlier pass, a per-sample input or metadata of the rows, as [R, 1, ...]."""
        return _known(self.rows, name)[:, None]

    def column(self, name: str) -> Tensor:
        """The same of the columns, as [1, C, ...]."""
        return _known(self.columns, name)[None]

    def uniform(self, seed: int) -> Tensor:
        """[R, C] numbers in [0, 1) that depend on seed, step and the two samples alone: the same in recomputation, for
        any tiling and any number of workers.
        """
        rows, columns = _known(self.rows, "key"), _known(self.columns, "key")
        return randomness.uniform(seed, self.clock.step, rows[:, None], columns[None], dtype=self.scores.dtype)

    @cached_property
    def own(self) -> Tensor:
        """[R, C] bool: row and column belong to the same sample (within one view: the row itself)."""
        return self._own if self._own is not None else torch.zeros_like(self.scores, dtype=torch.bool)

    @cached_property
    def _own(self) -> Tensor | None:
        """`own`, or None where the tile is known to have no such entry; most tiles have none and skip its masks."""
        if self.rows.apart(self.columns):
            return None
        return (self.rows.sample[:, None] == self.columns.sample) & (self.rows.sample >= 0)[:, None]

    @cached_property
    def positive(self) -> Tensor:
        """[R, C] bool: `own`, where the column is a view of the sample and not one of its mined negatives."""
        return self._positive if self._positive is not None else torch.zeros_like(self.scores, dtype=torch.bool)

    @property
    def _positive(self) -> Tensor | None:
        return self._own if self.columns.role == "view" else None

    @cached_property
    def valid(self) -> Tensor | None:
        """[R, C] bool: neither sample is masked, and within one view not the row itself; None where all are."""
        masks = []
        if self.row_view == self.column_view and self._own is not None:
            masks.append(~self._own)
        if self.rows.masked:
            masks.append((self.rows.weight > 0)[:, None].expand(self.scores.shape))
        if self.columns.masked:
            masks.append((self.columns.weight > 0).expand(self.scores.shape))
        return _all(masks)

    @cached_property
    def same_content(self) -> Tensor | None:
        """[R, C] bool: row and column hold the same content; None where no two samples do."""
        if self.rows.content is None or self.columns.content is None:
            return None
        for repeated in (self.rows.repeated, self.columns.repeated):
            if repeated is not None and not repeated.any():
                return None
        return (self.rows.content[:, None] == self.columns.content).any(-1)

    @cached_property
    def candidates(self) -> Tensor | None:
        """[R, C] bool: `valid`, without repetitions of the row's own content; None where all are."""
        masks = [] if self.valid is None else [self.valid]
        if self.same_content is not None:
            masks.append(~self.same_content if self._positive is None else ~self.same_content | self._positive)
        return _all(masks)

    @cached_property
    def negatives(self) -> Tensor | None:
        """[R, C] bool: `candidates` without the row's own positives; None where all are."""
        masks = [] if self.candidates is None else [self.candidates]
        return _all(masks if self._positive is None else [*masks, ~self._positive])

    def counts(self, reduction: Reduction) -> Tensor | None:
        """[R, C] bool: which entries of a reduction count; None for all of them."""
        over = {"candidates": "candidates", "negatives": "negatives", "all": "valid"}[reduction.over]
        masks = [mask for mask in (getattr(self, over), reduction.mask) if mask is not None]
        return _all([mask.expand(self.scores.shape) for mask in masks])


def _known(known: Known, name: str) -> Tensor:
    for source in (known.statistics, known.meta):
        if name in source:
            return source[name]
    if name == "key":  # without ids, the place in the global batch
        return known.sample
    available = ", ".join([*known.statistics, *known.meta]) or "nothing"
    raise DataError(f"A rule reads {name!r}, but the batch and the earlier passes have only {available}.")


def _all(masks: Sequence[Tensor]) -> Tensor | None:
    if not masks:
        return None
    result = masks[0]
    for mask in masks[1:]:
        result = result & mask
    return result
