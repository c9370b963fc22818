"""From raw samples to what a tower reads: image bytes to uint8 tensors, strings to token ids.

Everything here is picklable and free of state, so that any thread or process may use it. Images stay uint8: the
tower normalises them on its device, which moves a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cl.encoders.tokenizers import Tokenizer
from cl.errors import ConfigError, DataError
from cl.views.images import Augmentation, UnreadableImageError, load_image


@dataclass(frozen=True)
class ImageInput:
    """Encoded images -> uint8 [B, 3, size, size].

    Attributes:
        size: side of the square the tower reads, pixels.
        augmentation: random crop and flip for training; None resizes the short side and crops the centre.
    """

    size: int
    augmentation: Augmentation | None = None
    modality: str = "image"

    def load(self, data: bytes, seed: int, out: np.ndarray) -> None:
        """Decode one image into `out`, uint8 [3, size, size]; raises UnreadableImageError."""
        out[:] = load_image(data, self.size, self.augmentation, seed).transpose(2, 0, 1)


@dataclass(frozen=True)
class TextInput:
    """Strings -> token ids int64 [B, L], with an attention mask beside them if the tower wants one.

    Attributes:
        tokenizer: strings to ids with special tokens, cut to the tower's context.
        masked: True gives {"input_ids": [B, L], "attention_mask": [B, L]}, False the ids alone.
        length: pad to this many tokens; None pads to the longest of the batch (rounded up to 8).
    """

    tokenizer: Tokenizer
    masked: bool
    length: int | None = None
    modality: str = "text"

    def encode(self, texts: Sequence[str]) -> Tensor | dict[str, Tensor]:
        """Tokenise and pad a batch."""
        rows = self.tokenizer(texts)
        longest = max((len(row) for row in rows), default=1)
        width = self.length or min(-(-longest // 8) * 8, self.tokenizer.max_tokens)
        ids = np.full((len(rows), width), self.tokenizer.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            mask[number, : len(row)] = 1
        if not self.masked:
            return torch.from_numpy(ids)
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


ViewInput = ImageInput | TextInput


@dataclass(frozen=True)
class Inputs:
    """The inputs of all views of a model, by view name."""

    views: dict[str, ViewInput]

    def modality(self, view: str) -> str:
        """`image` or `text`."""
        return self._view(view).modality

    def image(self, view: str) -> ImageInput:
        """The image input of a view."""
        spec = self._view(view)
        if not isinstance(spec, ImageInput):
            raise ConfigError(f"View {view!r} of the model reads text, but was given images.")
        return spec

    def text(self, view: str) -> TextInput:
        """The text input of a view."""
        spec = self._view(view)
        if not isinstance(spec, TextInput):
            raise ConfigError(f"View {view!r} of the model reads images, but was given text.")
        return spec

    def images(
        self,
        view: str,
        data: Sequence[bytes],
        seeds: Sequence[int] | None = None,
        failures: dict[int, str] | None = None,
    ) -> Tensor:
        """Decode encoded images to uint8 [B, 3, size, size].

        Args:
            view: name of an image view.
            data: encoded images.
            seeds: one integer an image that fixes its augmentation; not used without augmentation.
            failures: filled with row -> reason for images that cannot be decoded, whose rows stay 0.

        Raises:
            DataError: an image cannot be decoded and `failures` was not given.
        """
        spec = self.image(view)
        out = np.zeros((len(data), 3, spec.size, spec.size), dtype=np.uint8)
        for row, encoded in enumerate(data):
            try:
                spec.load(encoded, seeds[row] if seeds is not None else 0, out[row])
            except UnreadableImageError as error:
                if failures is None:
                    raise DataError(f"Image {row} of the batch cannot be used: {error}.") from error
                failures[row] = str(error)
        return torch.from_numpy(out)

    def texts(self, view: str, texts: Sequence[str]) -> Tensor | dict[str, Tensor]:
        """Tokenise strings to int64 [B, L], or to a dict of ids and attention mask."""
        return self.text(view).encode(texts)

    def _view(self, view: str) -> ViewInput:
        if view not in self.views:
            raise ConfigError(f"The model has no view {view!r}; it has {', '.join(self.views)}.")
        return self.views[view]
