"""Vectors of length 1, safe at zero."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(rows: Tensor) -> Tensor:
    """`rows` [..., D] with length 1, in float32 or float64; a zero row stays zero and passes no gradient."""
    if rows.dtype != torch.float64:
        rows = rows.float()
    square = (rows * rows).sum(-1, keepdim=True)
    alive = square > torch.finfo(rows.dtype).tiny
    return rows * torch.where(alive, torch.where(alive, square, 1.0).rsqrt(), 0.0)
