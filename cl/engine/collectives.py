"""Collectives over workers whose local batches may be uneven, and the gradients that go with them.

Gradient convention. Every worker returns the same, detached value of the global loss. Calling `backward` deposits
on a local embedding P times its gradient, and on a replicated parameter P times this worker's *part* of the gradient,
where P is the number of workers over which the wrapper *averages* gradients (the world size under DDP, 1 where
gradients are summed). After the wrapper's average, every parameter has the exact gradient of the global loss, so
neither the loss nor the learning rate needs a factor of the world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """The workers that share negatives.

    Attributes:
        group: the process group, or None for a process alone.
        rank: this worker's place in the group.
        size: number of workers in the group.
        averaged_by: P, the number of workers over which parameter gradients are averaged afterwards.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    averaged_by: int = 1

    @staticmethod
    def current(group: dist.ProcessGroup | None = None, averaged_by: int | None = None) -> Workers:
        """The workers of `group` (default: all), or a process alone where torch.distributed is not set up.

        Args:
            averaged_by: defaults to the size of the default group, as DDP averages.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return Workers(averaged_by=averaged_by or 1)
        group = group or dist.group.WORLD
        return Workers(group, dist.get_rank(group), dist.get_world_size(group), averaged_by or dist.get_world_size())

    def all_reduce(self, value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce in place over the workers (no gradient) and return the tensor."""
        if self.size > 1:
            dist.all_reduce(value, op=op, group=self.group)
        return value

    def all_reduce_together(
        self, values: Sequence[Tensor], op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> list[Tensor]:
        """Several tensors of any shapes reduced over the workers (no gradient), not in place; one collective a type."""
        if self.size == 1:
            return list(values)
        reduced: dict[int, Tensor] = {}
        for kind in dict.fromkeys(value.dtype for value in values):
            places = [n for n, value in enumerate(values) if value.dtype == kind]
            together = self.all_reduce(torch.cat([values[n].reshape(-1) for n in places]), op)
            parts = together.split([values[n].numel() for n in places])
            reduced |= {n: part.view(values[n].shape) for n, part in zip(places, parts, strict=True)}
        return [reduced[n] for n in range(len(values))]

    def layout(self, rows: int, device: torch.device) -> Layout:
        """Learn how many rows each worker holds; one small collective."""
        if self.size == 1:
            return Layout(self, (rows,))
        counts = torch.empty(self.size, dtype=torch.int64, device=device)
        dist.all_gather_single(counts, torch.tensor([rows], device=device), group=self.group)
        return Layout(self, tuple(counts.tolist()))


@dataclass(frozen=True)
class Layout:
    """Which rows of the global batch are whose: worker r holds `rows[r]` of them, in order of rank.

    Collectives on even layouts use one fused call; uneven ones pad to the largest worker.
    """

    workers: Workers
    rows: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.rows)

    @property
    def local(self) -> slice:
        """This worker's rows in the gathered order."""
        start = sum(self.rows[: self.workers.rank])
        return slice(start, start + self.rows[self.workers.rank])

    def _spans(self) -> list[tuple[int, int]]:
        return list(zip((0, *accumulate(self.rows[:-1])), self.rows, strict=True))

    def _pad(self, value: Tensor) -> Tensor:
        missing = max(self.rows) - value.shape[0]
        return torch.cat([value, value.new_zeros(missing, *value.shape[1:])]) if missing else value.contiguous()

    def gather(self, value: Tensor) -> Tensor:
        """All workers' rows [N, ...] of a local [B, ...]; no gradient."""
        value = value.detach()
        if self.workers.size == 1:
            return value
        most = max(self.rows)
        padded = value.new_empty(self.workers.size * most, *value.shape[1:])
        dist.all_gather_single(padded, self._pad(value), group=self.workers.group)
        if self.total == padded.shape[0]:
            return padded
        return torch.cat([padded[r * most : r * most + rows] for r, rows in enumerate(self.rows)])

    def gather_together(self, values: Sequence[Tensor]) -> list[Tensor]:
        """`gather` of several values [B, ...] of any types by one collective: a row travels as its bytes."""
        if self.workers.size == 1 or len(values) < 2:
            return [self.gather(value) for value in values]
        own = self.rows[self.workers.rank]
        rows = [value.detach().reshape(own, math.prod(value.shape[1:])) for value in values]
        as_bytes = [_reread(each, torch.uint8) for each in rows]
        parts = self.gather(torch.cat(as_bytes, 1)).split([each.shape[1] for each in as_bytes], 1)
        return [
            _reread(part, value.dtype).reshape(self.total, *value.shape[1:])
            for part, value in zip(parts, values, strict=True)
        ]

    def reduce_scatter(self, value: Tensor) -> Tensor:
        """Sum [N, ...] over the workers and return this worker's rows [B, ...]; no gradient."""
        if self.workers.size == 1:
            return value
        most = max(self.rows)
        if self.total != self.workers.size * most:
            value = torch.cat([_pad_to(value[start : start + rows], most) for start, rows in self._spans()])
        out = value.new_empty(most, *value.shape[1:])
        dist.reduce_scatter_single(out, value.contiguous(), group=self.workers.group)
        return out[: self.rows[self.workers.rank]]

    def reduce_scatter_together(self, values: Sequence[Tensor]) -> list[Tensor]:
        """`reduce_scatter` of several values [N, ...] by one collective."""
        if self.workers.size == 1 or len(values) < 2:
            return [self.reduce_scatter(value) for value in values]
        flat = [value.reshape(len(value), math.prod(value.shape[1:])) for value in values]
        parts = self.reduce_scatter(torch.cat(flat, 1)).split([each.shape[1] for each in flat], 1)
        return [
            part.to(value.dtype).reshape(len(part), *value.shape[1:]) for part, value in zip(parts, values, strict=True)
        ]

    def complete(self, adjoints: Sequence[Tensor]) -> list[Tensor]:
        """The adjoints of all rows, each [N, ...], from those of the rows that a worker owns."""
        return self.gather_together(adjoints)

    def ring(self, *values: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Let every worker's rows visit every worker: yields (owner, its rows of each value), own rows first.

        The next block travels while the caller computes on the present one; memory is two blocks.
        """
        workers = self.workers
        most = max(self.rows)
        held = [self._pad(value.detach()) for value in values]
        for hop in range(workers.size):
            owner = (workers.rank - hop) % workers.size
            pending: list[dist.Work] = []
            if hop + 1 < workers.size:
                arriving = [torch.empty_like(value) for value in held]
                pending = self._shift(held, arriving)
            rows = self.rows[owner]
            yield owner, tuple(value if rows == most else value[:rows] for value in held)
            for work in pending:
                work.wait()
            if pending:
                held = arriving

    def _shift(self, leaving: list[Tensor], arriving: list[Tensor]) -> list[dist.Work]:
        group, rank, size = self.workers.group, self.workers.rank, self.workers.size
        operations = []
        for out, into in zip(leaving, arriving, strict=True):
            operations.append(dist.P2POp(dist.isend, out, group=group, group_peer=(rank + 1) % size))
            operations.append(dist.P2POp(dist.irecv, into, group=group, group_peer=(rank - 1) % size))
        return dist.batch_isend_irecv(operations)

    def pass_on(self, value: Tensor) -> Tensor:
        """Send a padded block to the next worker and receive the previous one's; for sums that travel the ring."""
        if self.workers.size == 1:
            return value
        arriving = torch.empty_like(value)
        for work in self._shift([value.contiguous()], [arriving]):
            work.wait()
        return arriving


class Replicated(Layout):
    """Rows that every worker holds alike (queues, prototypes): gathering is no work, and gradients are each worker's
    part, as for any replicated parameter.
    """

    @property
    def local(self) -> slice:
        return slice(0, self.total)

    def gather(self, value: Tensor) -> Tensor:
        return value.detach()

    def gather_together(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [value.detach() for value in values]

    def reduce_scatter(self, value: Tensor) -> Tensor:
        return value

    def complete(self, adjoints: Sequence[Tensor]) -> list[Tensor]:
        return self.workers.all_reduce_together(adjoints)


def _reread(values: Tensor, kind: torch.dtype) -> Tensor:
    """The bytes of [n, m] as another type."""
    if not values.shape[1]:
        return values.new_empty(values.shape, dtype=kind)
    # Cloned, as a tensor of one row passes for contiguous whatever its strides and offset, which bytes must fit.
    return values.clone(memory_format=torch.contiguous_format).view(kind)


def _pad_to(value: Tensor, rows: int) -> Tensor:
    missing = rows - value.shape[0]
    return torch.cat([value, value.new_zeros(missing, *value.shape[1:])]) if missing else value


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout  # type: ignore[attr-defined]
        # Autograd does not allow returning the input itself.
        return layout.gather(value) if layout.workers.size > 1 else value.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.layout.reduce_scatter(grad), None  # type: ignore[attr-defined]


def gather_rows(value: Tensor, layout: Layout) -> Tensor:
    """All workers' rows [N, ...] of a local [B, ...], with the exact gradient.

    The gradient of a worker's rows is the sum over workers of what each deposits on them, so a loss that every
    worker computes for its own anchors only, and whose parts are summed, has the gradient of the sum.
    """
    return _GatherRows.apply(value, layout)
