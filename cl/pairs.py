"""The batch contract: what an objective sees of one step.

One `Pairs` holds one worker's part of the global batch. Row i of every view belongs to sample i; everything else
describes the samples in the same order. Whatever an objective needs of other workers, the engine gathers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cl.errors import DataError


@dataclass(frozen=True)
class Pairs:
    """Embeddings of one worker's samples, and what is known about the samples.

    Attributes:
        views: name -> embeddings [B, D]; every view has the same B, and views that are compared the same D.
        ids: stable 128-bit sample ids as int64 [B, 2], for messages and per-sample state.
        content: content ids, int64 [B] or [B, K] (one column a modality: picture, caption). Two samples that agree in
            any column hold the same content: neither is ever the other's negative.
        weight: weight of each sample's terms, [B], not negative; 0 masks a sample (padding, corrupt input) out of
            every sum, as anchor, positive and negative. None means all ones.
    """

    views: Mapping[str, Tensor]
    ids: Tensor | None = None
    content: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.views:
            raise DataError("A batch needs at least one view.")
        sizes = {name: tuple(view.shape) for name, view in self.views.items()}
        first, rows = next((name, shape[0]) for name, shape in sizes.items())
        for name, shape in sizes.items():
            if len(shape) != 2:
                raise DataError(f"View {name!r} has shape {list(shape)}; expected [samples, dimensions].")
            if shape[0] != rows:
                raise DataError(f"View {name!r} has {shape[0]} samples, but view {first!r} has {rows}.")
        for field, dims in (("ids", (2,)), ("content", (1, 2)), ("weight", (1,))):
            value: Tensor | None = getattr(self, field)
            if value is not None and (value.dim() not in dims or value.shape[0] != rows):
                raise DataError(f"Field {field!r} has shape {list(value.shape)}, but the batch has {rows} samples.")

    def __len__(self) -> int:
        return next(iter(self.views.values())).shape[0]

    def view(self, name: str) -> Tensor:
        """One view's embeddings [B, D], with a clear error when it is not there."""
        if name not in self.views:
            raise DataError(f"The batch has no view {name!r}; it has {', '.join(self.views)}.")
        return self.views[name]

    def weights(self, dtype: torch.dtype) -> Tensor:
        """The weight of each sample [B] in `dtype`, ones where none was given."""
        first = next(iter(self.views.values()))
        if self.weight is None:
            return torch.ones(first.shape[0], dtype=dtype, device=first.device)
        return self.weight.to(device=first.device, dtype=dtype)

    def content_columns(self) -> Tensor | None:
        """Content ids as [B, K], or None."""
        if self.content is None:
            return None
        return self.content if self.content.dim() == 2 else self.content[:, None]
