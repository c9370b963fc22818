"""What maps a tower's pooled features to the shared space."""

from __future__ import annotations

from typing import Literal

from torch import nn

from cl.errors import ConfigError

HeadKind = Literal["linear", "mlp", "none"]


def build_head(kind: HeadKind, width: int, embed_dim: int) -> nn.Module:
    """A head [B, width] -> [B, embed_dim]: one matrix, two with a GELU between them, or none.

    Raises:
        ConfigError: `none`, but the widths differ.
    """
    if kind == "linear":
        return nn.Linear(width, embed_dim, bias=False)
    if kind == "mlp":
        middle = (width + embed_dim) // 2
        return nn.Sequential(nn.Linear(width, middle), nn.GELU(), nn.Linear(middle, embed_dim, bias=False))
    if width != embed_dim:
        raise ConfigError(f"head is none, but the tower's hidden size {width} is not embed_dim {embed_dim}.")
    return nn.Identity()
