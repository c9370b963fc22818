"""Neighbours of samples among earlier ones, and a small transformer that reads samples with their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cl.errors import ConfigError
from cl.memory.queue import Queue

ANCHORS_AT_A_TIME = 256  # x queue: the similarities that are held at once


@torch.no_grad()
def nearest(queue: Queue, anchors: Tensor, weight: Tensor, count: int = 1) -> Tensor:
    """The elements of a queue most similar to each anchor, the nearest first.

    Args:
        queue: until it holds `count` elements, anchors are their own neighbours.
        anchors: [B, D].
        weight: [B], 0 masks.

    Returns:
        [B, count, D], without gradient.
    """
    anchors = anchors.detach().where((weight > 0)[:, None], 0)
    if int(queue.filled.sum()) < count:
        return anchors[:, None].expand(-1, count, -1)
    known = queue.embeddings[queue.filled].to(anchors.dtype)
    found = [(part @ known.T).topk(count, 1).indices for part in anchors.split(ANCHORS_AT_A_TIME)]
    return known[torch.cat(found)]


class NeighbourAttention(nn.Module):
    """Transformer layers over a short sequence of embeddings; the answer is what stands at its first place.

    Without dropout, so that the result does not depend on how the batch is divided among the workers.
    """

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"heads ({heads}) must divide the width of the embeddings that are read ({width}).")
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True) for _ in range(layers)
        )

    def forward(self, rows: Tensor) -> Tensor:
        """[B, T, D] -> [B, D]."""
        rows = rows + positions(rows)
        for layer in self.layers:
            rows = layer(rows)
        return rows[:, 0]


def positions(rows: Tensor) -> Tensor:
    """[T, D]: sines and cosines of the places in a sequence (Vaswani et al. 2017, "Attention Is All You Need")."""
    count, width = rows.shape[1:]
    place = torch.arange(count, device=rows.device, dtype=rows.dtype)[:, None]
    number = torch.arange(width, device=rows.device)
    angle = place / 10000.0 ** (number.div(2, rounding_mode="floor").to(rows.dtype) * 2 / width)
    return torch.where(number % 2 == 0, angle.sin(), angle.cos())
