"""Augmentation of texts: a span of the words, and words left out.

A view without an augmentation is the same text again: with dropout in the tower that is the pair of Gao et al. 2021,
"SimCSE: Simple Contrastive Learning of Sentence Embeddings".
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from cl.views.augmentation import Augmentation
from cl.views.draws import uniforms


class TextAugmentation(Augmentation):
    """What is drawn for a training text. Words are what white space separates; at least one is kept."""

    modality: ClassVar[str] = "text"

    span: tuple[float, float] | None = Field(
        None, description="share of the words, from and to, that a span of random place keeps; null: all"
    )
    delete: float = Field(0.0, ge=0, lt=1, description="probability with which each word is left out")

    @model_validator(mode="after")
    def _ranges(self) -> TextAugmentation:
        if self.span is not None and not 0 < self.span[0] <= self.span[1] <= 1:
            raise ValueError(f"span must rise within (0, 1], not {list(self.span)}")
        return self

    def apply(self, text: str, seed: int) -> str:
        """The text of a view; the seed fixes it."""
        words = text.split()
        if not words:
            return text
        share, place, *others = uniforms(seed, 3 + len(words))
        if self.span is not None:
            kept = max(1, round(len(words) * (self.span[0] + share * (self.span[1] - self.span[0]))))
            start = int(place * (len(words) - kept + 1))
            words = words[start : start + kept]
        if self.delete:
            spared, *fates = others
            left = [word for word, fate in zip(words, fates, strict=False) if fate >= self.delete]
            words = left or [words[int(spared * len(words))]]
        return " ".join(words)
