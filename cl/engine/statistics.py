"""Statistics of rows and columns while they are being reduced, tile by tile, and when they are finished.

A statistic of view v is made of a row part (tiles whose rows are v: complete on the worker that owns the row) and a
column part (tiles whose columns are v: partial on every worker, all-reduced). Both parts merge at the owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from cl.engine.collectives import Layout, Workers
from cl.engine.reduction import Reduction

Key = tuple[str, str]  # name of the statistic, view


def merge_lse(first: Tensor, second: Tensor) -> Tensor:
    """log(exp first + exp second), -inf where both are."""
    return torch.logaddexp(first, second)


def weights_of(lse: Tensor, total: Tensor) -> Tensor:
    """exp(lse - total), 0 where nothing was counted."""
    return (lse - total.where(total > -torch.inf, 0)).exp()


def best(values: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `values` [n, m] and their `positions` [n, m]; among equals the smaller position."""
    if values.shape[1] > k:
        top = values.topk(k, dim=1)
        if bool(((values >= top.values[:, -1:]) & (values > -torch.inf)).sum(1).le(k).all()):
            values, positions = top.values, positions.gather(1, top.indices)
    order = positions.argsort(dim=1)
    values, positions = values.gather(1, order), positions.gather(1, order)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, order), positions.gather(1, order)


@dataclass
class Part:
    """The running reduction of one axis: `lse` or `sum` in `value`; `mean` adds a weight; `top` adds positions."""

    kind: str
    value: Tensor  # lse, sum, mean: [n]; top: [n, k]
    lse: Tensor | None = None  # mean: [n], the log of the weight behind `value`
    position: Tensor | None = None  # top: [n, k] int64, the column of each value; -1 for none

    @staticmethod
    def empty(reduction: Reduction, rows: int) -> Part:
        like = reduction.values
        if reduction.kind == "lse":
            return Part("lse", like.new_full((rows,), -torch.inf))
        if reduction.kind == "sum":
            return Part("sum", like.new_zeros(rows))
        if reduction.kind == "mean":
            return Part("mean", like.new_zeros(rows), like.new_full((rows,), -torch.inf))
        position = torch.full((rows, reduction.k), -1, dtype=torch.int64, device=like.device)
        return Part("top", like.new_full((rows, reduction.k), -torch.inf), position=position)

    def add_(self, at: slice, reduction: Reduction, counts: Tensor | None, first: int) -> None:
        """Take one tile's entries in; `at` are the rows (or columns) of the tile in this part, `first` the position of
        the first entry that is reduced.
        """
        dim = 1 if reduction.axis == "row" else 0
        values = reduction.values
        if self.kind == "sum":
            self.value[at] += (values if counts is None else values.where(counts, 0)).sum(dim)
            return
        values = values if counts is None else values.where(counts, -torch.inf)
        if self.kind == "lse":
            self.value[at] = merge_lse(self.value[at], values.logsumexp(dim))
        elif self.kind == "mean":
            assert self.lse is not None
            assert reduction.payload is not None
            lse = values.logsumexp(dim)
            payload = reduction.payload if counts is None else reduction.payload.where(counts, 0)
            mean = (weights_of(values, lse.unsqueeze(dim)) * payload).sum(dim)
            total = merge_lse(self.lse[at], lse)
            self.value[at] = weights_of(self.lse[at], total) * self.value[at] + weights_of(lse, total) * mean
            self.lse[at] = total
        else:
            assert self.position is not None
            values = values if dim == 1 else values.T
            entries = torch.arange(first, first + values.shape[1], device=values.device).expand(values.shape)
            entries = entries.where(values > -torch.inf, -1)
            every, positions = torch.cat([self.value[at], values], 1), torch.cat([self.position[at], entries], 1)
            self.value[at], self.position[at] = best(every, positions, reduction.k)

    def merged(self, other: Part) -> Part:
        """Both parts of the same rows in one."""
        if self.kind == "sum":
            return Part("sum", self.value + other.value)
        if self.kind == "lse":
            return Part("lse", merge_lse(self.value, other.value))
        if self.kind == "top":
            assert self.position is not None
            assert other.position is not None
            positions = torch.cat([self.position, other.position], 1)
            value, position = best(torch.cat([self.value, other.value], 1), positions, self.value.shape[1])
            return Part("top", value, position=position)
        assert self.lse is not None
        assert other.lse is not None
        total = merge_lse(self.lse, other.lse)
        mean = weights_of(self.lse, total) * self.value + weights_of(other.lse, total) * other.value
        return Part("mean", mean, total)

    def select(self, rows: slice) -> Part:
        return self._each(lambda value: value[rows])

    def tensors(self) -> list[Tensor]:
        return [value for value in (self.value, self.lse, self.position) if value is not None]

    def with_tensors(self, tensors: Iterator[Tensor]) -> Part:
        """The same made of others, in the order of `tensors`."""
        return self._each(lambda _: next(tensors))

    def _each(self, function: Callable[[Tensor], Tensor]) -> Part:
        value, lse, position = (None if t is None else function(t) for t in (self.value, self.lse, self.position))
        assert value is not None
        return Part(self.kind, value, lse, position)


def complete_(parts: Sequence[Part], workers: Workers) -> None:
    """Complete column parts over the workers: all softmaxes by two collectives, all sums by the second of them."""
    if workers.size == 1:
        return
    sums, softmaxes = [p for p in parts if p.kind == "sum"], [p for p in parts if p.kind in ("lse", "mean")]
    lses = [p.value if p.kind == "lse" else p.lse for p in softmaxes]
    shifts = [
        largest.where(largest > -torch.inf, 0)
        for largest in workers.all_reduce_together([lse for lse in lses if lse is not None], dist.ReduceOp.MAX)
    ]
    weights = [(lse - shift).exp() for lse, shift in zip(lses, shifts, strict=True) if lse is not None]
    weighted = [weight * p.value for p, weight in zip(softmaxes, weights, strict=True) if p.kind == "mean"]
    reduced = iter(workers.all_reduce_together([p.value for p in sums] + weights + weighted))
    for part in sums:
        part.value = next(reduced)
    weights = [next(reduced) for _ in weights]
    for part, weight, shift in zip(softmaxes, weights, shifts, strict=True):
        total = weight.log() + shift
        if part.kind == "lse":
            part.value = total
        else:
            part.value, part.lse = torch.where(weight > 0, next(reduced) / weight, 0), total
    for part in parts:
        if part.kind == "top":
            _complete_top_(part, workers)


def _complete_top_(part: Part, workers: Workers) -> None:
    assert part.position is not None
    every = Layout(workers, (len(part.value),) * workers.size)
    size, k = part.value.shape

    def beside(value: Tensor) -> Tensor:
        """[n, W k]: what all workers hold of each row."""
        return value.view(workers.size, size, k).transpose(0, 1).reshape(size, workers.size * k)

    value, position = every.gather_together([part.value, part.position])
    part.value, part.position = best(beside(value), beside(position), k)


@dataclass
class Finished:
    """A finished statistic: this worker's rows, and all workers' unless nobody will read them."""

    local: Part
    everyone: Part | None
    by_column: bool = False  # whether any tile reduced its columns to it


@dataclass
class Running:
    """The statistics of one pass while its sweep runs."""

    row_parts: dict[Key, Part] = field(default_factory=dict)
    column_parts: dict[Key, Part] = field(default_factory=dict)

    def part(self, key: Key, reduction: Reduction, rows: int) -> Part:
        parts = self.row_parts if reduction.axis == "row" else self.column_parts
        if key not in parts:
            parts[key] = Part.empty(reduction, rows)
        return parts[key]

    def finish(self, layouts: dict[str, Layout], last: bool) -> dict[Key, Finished]:
        """Complete over the workers and merge row with column parts; what rows alone were reduced to in the `last` pass
        stays where it is.
        """
        # Every worker sees the same names in the same order: collectives must match.
        keys = list(dict.fromkeys([*self.row_parts, *self.column_parts]))
        if keys:
            complete_(list(self.column_parts.values()), layouts[keys[0][1]].workers)
        finished: dict[Key, Finished] = {}
        rows: dict[Layout, list[Key]] = {}
        for key in keys:
            layout, row, column = layouts[key[1]], self.row_parts.get(key), self.column_parts.get(key)
            if row is None:
                assert column is not None
                finished[key] = Finished(column.select(layout.local), column, by_column=True)
            else:
                local = row if column is None else row.merged(column.select(layout.local))
                finished[key] = Finished(local, None, by_column=column is not None)
                if column is not None or not last:
                    rows.setdefault(layout, []).append(key)
        for layout, several in rows.items():
            everyone = iter(layout.gather_together([t for key in several for t in finished[key].local.tensors()]))
            for key in several:
                finished[key].everyone = finished[key].local.with_tensors(everyone)
        return finished
