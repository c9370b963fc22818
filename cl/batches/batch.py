"""One worker's part of a step, as it comes from the loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Further:
    """Further texts that belong to a batch's samples, any number each (`cl.batches.extra`).

    Attributes:
        view: the view of the model that they are read as.
        role: what they are to their samples.
        inputs: what the view's tower reads, [M, ...].
        owner: int64 [M], rising, the local rows that they belong to.
        content: int64 [M, fields], in the columns of `Batch.content`.
    """

    view: str
    role: Literal["negative", "positive"]
    inputs: Tensor | dict[str, Tensor]
    owner: Tensor
    content: Tensor

    def rows(self, part: slice) -> Further:
        """Those of the samples start..stop, whose rows count from 0 again."""
        kept = (self.owner >= part.start) & (self.owner < part.stop)
        made = self.each(lambda tensor: tensor[kept])
        return replace(made, owner=made.owner - part.start)

    def each(self, change: Callable[[Tensor], Tensor]) -> Further:
        """With every tensor changed."""
        inputs = self.inputs
        changed = {n: change(x) for n, x in inputs.items()} if isinstance(inputs, dict) else change(inputs)
        return replace(self, inputs=changed, owner=change(self.owner), content=change(self.content))


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step.

    Attributes:
        views: what each tower reads: uint8 images [B, 3, H, W], token ids [B, L] or a dict of ids and mask.
        ids: 128-bit sample ids, int64 [B, 2]; 0 where padded.
        content: 64-bit content ids, int64 [B, fields]; samples that agree in any field are not each other's negatives.
        weight: float32 [B]: 1, or 0 for padding and for samples that could not be decoded.
        epoch, step: the step's place; `step` counts within the epoch.
        key: integer of 63 bits fixed by (seed, epoch, step), the same on all workers, for the step's random choices.
        labels: name -> int64 or float32 [B] or [B, K] (`cl.batches.labels`); 0 where padded.
        extra: name -> further texts of the samples.
        stored: view -> embeddings that were made before, float32 [B, D]; 0 where padded (`cl.batches.stored`).
    """

    views: Mapping[str, Tensor | dict[str, Tensor]]
    ids: Tensor
    content: Tensor
    weight: Tensor
    epoch: int
    step: int
    key: int
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Further] = field(default_factory=dict)
    stored: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.weight)

    def rows(self, part: slice) -> Batch:
        """The same step's batch with its samples start..stop."""
        made = replace(self, extra={})._each(lambda tensor: tensor[part])
        return replace(made, extra={name: further.rows(part) for name, further in self.extra.items()})

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; pinned memory is copied without waiting."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The batch in page-locked memory, for copies to a GPU."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        views: dict[str, Tensor | dict[str, Tensor]] = {
            name: {part: change(tensor) for part, tensor in view.items()} if isinstance(view, dict) else change(view)
            for name, view in self.views.items()
        }
        return replace(
            self,
            views=views,
            ids=change(self.ids),
            content=change(self.content),
            weight=change(self.weight),
            labels={name: change(label) for name, label in self.labels.items()},
            extra={name: further.each(change) for name, further in self.extra.items()},
            stored={name: change(embeddings) for name, embeddings in self.stored.items()},
        )
