"""What a tower makes of a view: its embedding, and what lies before and beside it.

A view of the model says which of them the objective sees, and under which name:

    outputs      name in the batch   what it is
    embedding    VIEW                [B, D] of length 1, in the shared space
    features     VIEW_features       [B, W] as the tower pools them, before its projection: what heads read
    tokens       VIEW_tokens         [B, T, D] of length 1: patches or words, mapped to the shared space
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

OutputKind = Literal["embedding", "features", "tokens"]


class TowerOutputs(NamedTuple):
    """All that a tower gives.

    Attributes:
        embedding: [B, D], not normalised.
        features: [B, W], pooled, before the projection to D; None where the tower has none.
        tokens: [B, T, V], of patches or words; None where the tower has none.
    """

    embedding: Tensor
    features: Tensor | None = None
    tokens: Tensor | None = None


def output_name(view: str, kind: str) -> str:
    """What an output of a view is called in the batch."""
    return view if kind == "embedding" else f"{view}_{kind}"
