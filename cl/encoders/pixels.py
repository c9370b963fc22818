"""From the bytes of a picture to what a vision tower reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor, nn

from cl.views.augmentation import named
from cl.views.image_augmentation import ImageAugmentation


def _augment(value: Any) -> Any:
    """A mapping without a name changes fields of the weak augmentation."""
    return named({"name": "weak", **value} if isinstance(value, dict) else value)


TowerAugmentation = Annotated[
    Annotated[SerializeAsAny[ImageAugmentation], BeforeValidator(_augment)] | None,
    Field(description="of training images where the view has none of its own; null: the centre crop"),
]


class Pixels(nn.Module):
    """uint8 images [B, 3, H, W] -> (images / 255 - mean) / std, on their device and in the dtype of the tower."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # In units of a byte; not in the state dict, for they are config.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.dtype) - self.mean) / self.std
