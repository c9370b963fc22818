"""From raw samples to what a tower reads: image bytes to uint8 tensors, strings to token ids.

Everything here is picklable and free of state, so that any thread or process may use it. Images stay uint8: the
tower normalises them on its device, which moves a quarter of the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cl.encoders.tokenizers import Tokenizer
from cl.errors import ConfigError, DataError
from cl.views.image_augmentation import ImageAugmentation
from cl.views.images import UnreadableImageError, Wanted, load_views
from cl.views.texts import TextAugmentation


@dataclass(frozen=True)
class ImageInput:
    """Encoded images -> uint8 [B, 3, size, size].

    Attributes:
        size: side of the square the tower reads, pixels.
        augmentation: of training images; None resizes the short side and crops the centre.
    """

    size: int
    augmentation: ImageAugmentation | None = None
    modality: str = "image"

    def wanted(self, seed: int) -> Wanted:
        """What `cl.views.images.load_views` is to make of an image."""
        return Wanted(self.size, self.augmentation, seed)


@dataclass(frozen=True)
class TextInput:
    """Strings -> token ids int64 [B, L], with an attention mask beside them if the tower wants one.

    Attributes:
        tokenizer: strings to ids with special tokens, cut to the tower's context.
        masked: True gives {"input_ids": [B, L], "attention_mask": [B, L]}, False the ids alone.
        length: pad to this many tokens; None pads to the longest of the batch (rounded up to 8).
        augmentation: of training texts; None leaves them as they are.
    """

    tokenizer: Tokenizer
    masked: bool
    length: int | None = None
    augmentation: TextAugmentation | None = None
    modality: str = "text"

    def augmented(self, text: str, seed: int) -> str:
        """The text as the view shows it; the seed fixes what is drawn."""
        return text if self.augmentation is None else self.augmentation.apply(text, seed)

    def encode(self, texts: Sequence[str]) -> Tensor | dict[str, Tensor]:
        """Tokenise and pad a batch."""
        # A text without a single token is one of padding that counts: attention over nothing has no value.
        rows = [row or [self.tokenizer.pad_id] for row in self.tokenizer(texts)]
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
    """The inputs of all views of a model.

    Attributes:
        views: view name -> its input.
        fields: view name -> the field of a sample that it shows; the view's own name where it is not there.
        draws: view name -> the view whose random numbers it takes; its own where it is not there.
    """

    views: dict[str, ViewInput]
    fields: dict[str, str] = field(default_factory=dict)
    draws: dict[str, str] = field(default_factory=dict)

    def field_of(self, view: str) -> str:
        """The field of a sample that a view shows."""
        return self.fields.get(view, view)

    def distinct_fields(self) -> list[str]:
        """All fields that views show, in the order of the views."""
        return list(dict.fromkeys(self.field_of(view) for view in self.views))

    def draw_key(self, view: str) -> int:
        """63 bits that set a view's random numbers apart from those of other views."""
        name = self.draws.get(view, view)
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1

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
                (picture,) = load_views(encoded, [spec.wanted(seeds[row] if seeds is not None else 0)])
                out[row] = picture.transpose(2, 0, 1)
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
