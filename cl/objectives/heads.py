"""Projectors and predictors: small networks that belong to an objective, not to the model.

Batch normalisation in them uses the moments of the *global* batch, so their result does not depend on how it is divided
among the workers, and masked samples take no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from cl.engine import moments
from cl.engine.collectives import Workers


class GlobalBatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) over all workers' samples, then scale and shift (Ioffe and Szegedy 2015).

    There are no running averages: a head is not used after training.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, rows: Tensor, weight: Tensor, workers: Workers) -> Tensor:
        """rows [B, D], weight [B] (0 masks) -> [B, D]."""
        counted = (weight > 0).to(rows.dtype)
        centred = rows - moments.mean(rows, counted, workers)
        variance = moments.mean(centred.square(), counted, workers)
        normal = centred * (variance + self.eps).rsqrt()
        return normal * self.weight + self.bias


class Head(nn.Module):
    """Linear layers with batch norm and ReLU between them.

    Args:
        widths: from input to output; two numbers are one linear layer.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        last = len(widths) - 2
        # A bias before a batch norm would be subtracted again.
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=n == last) for n, (a, b) in enumerate(pairwise(widths)))
        self.norms = nn.ModuleList(GlobalBatchNorm(width) for width in widths[1:-1])

    def forward(self, rows: Tensor, weight: Tensor, workers: Workers) -> Tensor:
        """rows [B, D], weight [B] -> [B, E]; rows of masked samples are zeros on the way in."""
        rows = rows.where((weight > 0)[:, None], 0)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            rows = torch.relu(norm(layer(rows), weight, workers))
        return self.layers[-1](rows)
