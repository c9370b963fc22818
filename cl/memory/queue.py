"""A queue of the embeddings of earlier steps, the same on all workers.

He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning", section 3.1: the newest global
batch replaces the oldest. Every worker appends the samples of all workers in order of rank, masked ones left out, so
the queue does not depend on how many workers there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl.engine.collectives import Layout
from cl.engine.side import Side
from cl.errors import DataError


class Queue(nn.Module):
    """The last `size` embeddings that were pushed, and the content ids they came with.

    Attributes:
        embeddings: [size, D]; rows that were never filled are zeros.
        content: [size, K] int64, K columns as in the batches.
        filled: [size] bool.
        count: how many were ever pushed, 0-d int64; the next goes to row `count % size`.
    """

    embeddings: Tensor
    content: Tensor
    filled: Tensor
    count: Tensor

    def __init__(self, size: int, dimensions: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("embeddings", torch.zeros(size, dimensions))
        self.register_buffer("content", torch.zeros(size, 0, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def side(self, name: str, content: Tensor | None) -> Side:
        """The queue as columns; copies, so that a push does not change what backward sees.

        Args:
            name: of the side.
            content: content ids of the batch [B, K]; None where it has none.
        """
        self._fit(content)
        weight = self.filled.to(self.embeddings.dtype)
        nobody = torch.full((self.size,), -1, device=weight.device)
        known = None if content is None else self.content.clone()
        return Side(name, self.embeddings.clone(), nobody, weight, known, role="negative", replicated=True)

    @torch.no_grad()
    def push(self, embeddings: Tensor, content: Tensor | None, weight: Tensor, layout: Layout) -> None:
        """Append the samples of all workers that are not masked.

        Args:
            embeddings: [B, D] of this worker.
            content: [B, K] int64, or None.
            weight: [B], 0 leaves a sample out.
            layout: who holds which rows.
        """
        self._fit(content)
        everyones, newest, *contents = layout.gather_together(
            [weight, embeddings, *([] if content is None else [content])]
        )
        keep = everyones > 0
        newest = newest[keep][-self.size :]
        first = self.count + keep.sum() - len(newest)
        places = (first + torch.arange(len(newest), device=keep.device)) % self.size
        self.embeddings[places] = newest.to(self.embeddings.dtype)
        for everyones_content in contents:
            self.content[places] = everyones_content[keep][-self.size :]
        self.filled[places] = True
        self.count += keep.sum()

    def _fit(self, content: Tensor | None) -> None:
        """Give `content` as many columns as the batches have, which only they know.

        Raises:
            DataError: the batches changed.
        """
        if content is None or content.shape[1] == self.content.shape[1]:
            return
        if self.content.shape[1]:
            raise DataError(
                f"The batch has {content.shape[1]} columns of content ids, but the queue was filled with "
                f"{self.content.shape[1]}."
            )
        self.content = self.content.new_zeros(self.size, content.shape[1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}content")
        if isinstance(saved, Tensor) and len(saved) == self.size:
            self.content = self.content.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
