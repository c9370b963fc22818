"""A queue of the embeddings of earlier steps, the same on all workers.

He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", section 3.1: the newest global
batch replaces the oldest. Every worker appends the samples of all workers in order of rank, masked ones left out, so
the queue does not depend on how many workers there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.engine.collectives import Layout
from cl.engine.side import Side


class Queue(nn.Module):
    """The last `size` embeddings that were pushed, and the content ids they came with.

    Attributes:
        embeddings: [size, D]; rows that were never filled are zeros.
        content: [size, C] int64.
        filled: [size] bool.
        count: how many were ever pushed, 0-d int64; the next goes to row `count % size`.
    """

    embeddings: Tensor
    content: Tensor
    filled: Tensor
    count: Tensor

    def __init__(self, size: int, dimensions: int, content_columns: int = 1) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("embeddings", torch.zeros(size, dimensions))
        self.register_buffer("content", torch.zeros(size, content_columns, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def side(self, name: str, content: bool = True) -> Side:
        """The queue as columns; copies, so that a push does not change what backward sees."""
        weight = self.filled.to(self.embeddings.dtype)
        nobody = torch.full((self.size,), -1, device=weight.device)
        known = self.content.clone() if content else None
        return Side(name, self.embeddings.clone(), nobody, weight, known, role="negative", replicated=True)

    @torch.no_grad()
    def push(self, embeddings: Tensor, content: Tensor | None, weight: Tensor, layout: Layout) -> None:
        """Append the samples of all workers that are not masked.

        Args:
            embeddings: [B, D] of this worker.
            content: [B, C] int64, or None.
            weight: [B], 0 leaves a sample out.
            layout: who holds which rows.
        """
        keep = layout.gather(weight) > 0
        newest = layout.gather(embeddings)[keep][-self.size :]
        first = self.count + keep.sum() - len(newest)
        places = (first + torch.arange(len(newest), device=keep.device)) % self.size
        self.embeddings[places] = newest.to(self.embeddings.dtype)
        if content is not None:
            self.content[places] = layout.gather(content)[keep][-self.size :]
        self.filled[places] = True
        self.count += keep.sum()
