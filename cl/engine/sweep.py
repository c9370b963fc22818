"""How a sweep over all rows x all columns is cut and how columns come from other workers.

`gather`: all workers' columns are collected once a step and their gradients reduce-scattered at the end. `ring`: one
worker's columns at a time visit every worker, and their gradient travels with them. `local`: own columns only. All
give the same result; they differ in memory (all columns, two blocks, one block) and in traffic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cl.engine.collectives import Layout, Replicated

Exchange = Literal["gather", "ring", "local"]


@dataclass(frozen=True)
class Tiling:
    """How a block is cut: at most `rows` anchors by `columns` candidates at a time.

    A size of 0 follows from the device (`on`): a tile that stays in a processor's cache, or one that keeps an
    accelerator busy for longer than launching its kernels takes (128 MiB of float32 scores). `keep` MiB of scores may
    stay from forward to backward, so that small batches compute them once.
    """

    rows: int = 0
    columns: int = 0
    keep: int = 64

    def on(self, device: torch.device) -> Tiling:
        """The same with both sizes given."""
        rows, columns = (256, 2048) if device.type == "cpu" else (4096, 8192)
        return replace(self, rows=self.rows or rows, columns=self.columns or columns)

    def shrunk(self, cost: int) -> Tiling:
        """The same memory where each entry of a tile costs `cost` numbers."""
        if cost <= 1:
            return self
        entries = max(self.rows * self.columns // cost, 1)
        rows = max(1, min(self.rows, math.isqrt(entries)))
        return replace(self, rows=rows, columns=max(1, min(self.columns, entries // rows)))

    def cut(self, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """Row and column slices that cover rows x columns once, a band of columns at a time.

        A worker without rows gets one empty tile, so that it learns which reductions it must take part in.
        """
        for j in range(0, max(columns, 1), self.columns):
            for i in range(0, max(rows, 1), self.rows):
                yield slice(i, min(i + self.rows, rows)), slice(j, min(j + self.columns, columns))


@dataclass(frozen=True)
class Block:
    """Columns that are on this worker now: `values` [n, D] are columns `start` to `start + n` of all."""

    start: int
    values: Tensor
    gradient: Tensor  # [n, ...] in the accumulation type, to be added to in place; empty in a forward sweep


class ColumnExchange:
    """Brings all columns of a layout past this worker, block by block, in every sweep of a step.

    Args:
        values: this worker's columns [B, D].
        layout: how many columns each worker holds.
        exchange: `ring` circulates blocks; otherwise the layout's columns are gathered, and kept for the next sweep
            until `release`.
    """

    def __init__(self, values: Tensor, layout: Layout, exchange: Exchange) -> None:
        self.values, self.layout = values.detach(), layout
        self.ring = exchange == "ring" and layout.workers.size > 1 and not isinstance(layout, Replicated)
        self._gathered: Tensor | None = None
        self._gradient = values.new_empty(0)

    def blocks(self, accumulate: torch.dtype | None = None) -> Iterator[Block]:
        """One sweep. `accumulate` is the type of the gradients that it leaves; None for a sweep without."""
        if not self.ring:
            if self._gathered is None:
                self._gathered = self.layout.gather(self.values)
            self._gradient = self._zeros(len(self._gathered), accumulate)
            yield Block(0, self._gathered, self._gradient)
            return
        self._gradient = self._zeros(max(self.layout.rows), accumulate)
        for hop, (owner, (block,)) in enumerate(self.layout.ring(self.values)):
            if hop and accumulate is not None:
                self._gradient = self.layout.pass_on(self._gradient)
            yield Block(sum(self.layout.rows[:owner]), block, self._gradient[: len(block)])

    def _zeros(self, rows: int, kind: torch.dtype | None) -> Tensor:
        if kind is None:
            return self.values.new_empty(0)
        return torch.zeros(rows, *self.values.shape[1:], dtype=kind, device=self.values.device)

    def gradient(self) -> Tensor:
        """After a sweep with gradients: that of this worker's columns [B, D], summed over all workers."""
        gradient, self._gradient = self._gradient, self.values.new_empty(0)
        if not self.ring:
            return self.layout.reduce_scatter(gradient)
        return self.layout.pass_on(gradient)[: len(self.values)]

    def release(self) -> None:
        """Let go of what was gathered: the loss, and with it this, may live on for long after the step."""
        self._gathered = None


def repeated_content(content: Tensor) -> Tensor:
    """[N, K] bool: which content ids [N, K] occur more than once in their column; O(N) memory."""
    repeated = torch.zeros_like(content, dtype=torch.bool)
    for k in range(content.shape[1]):
        _, inverse, counts = content[:, k].unique(return_inverse=True, return_counts=True)
        repeated[:, k] = counts[inverse] > 1
    return repeated
