"""What a text is made of: letters, digits, signs, capitals, and characters that no text should have.

Shares are of the characters that are not white space (Rae et al. 2021, "Scaling Language Models: Methods, Analysis &
Insights from Training Gopher", appendix A1, judge documents by shares of this kind). Classes are Unicode's: letters and
marks (L, M), digits (N), signs (P, S). Unwanted are control and private characters, surrogates, code points without a
meaning (C but for formats, which joined emoji and some scripts need) and U+FFFD, what a wrong decoding leaves.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any, ClassVar, Final

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.shingles import blocks, code_points
from pipelines.stages.base import Output, Rows, RowStage, merged, reasons, text_fields
from pipelines.stages.registry import STAGES

SPACE, LETTER, CAPITAL, DIGIT, SIGN, UNWANTED, FORMAT = range(7)
CLASSES: Final = {"L": LETTER, "M": LETTER, "N": DIGIT, "P": SIGN, "S": SIGN, "Z": SPACE, "C": UNWANTED}


@lru_cache(maxsize=1)
def character_classes() -> np.ndarray:
    """uint8 [code points]."""
    table = np.zeros(0x110000, np.uint8)
    for code in range(len(table)):
        char = chr(code)
        category = unicodedata.category(char)
        table[code] = SPACE if char.isspace() else CLASSES[category[0]]
        if category in ("Lu", "Lt"):
            table[code] = CAPITAL
        elif category == "Cf":
            table[code] = FORMAT
    table[0xFFFD] = UNWANTED
    return table


def class_counts(texts: pa.StringArray) -> np.ndarray:
    """int64 [n, 7]: characters of each class."""
    parts = [np.zeros((0, 7), np.int64)]
    for block in blocks(texts):
        codes, bounds = code_points(block)
        cell = np.repeat(np.arange(len(block)) * 7, np.diff(bounds)) + character_classes()[codes]
        parts.append(np.bincount(cell, minlength=7 * len(block)).reshape(-1, 7))
    return np.concatenate(parts)


@STAGES.register(
    "characters",
    "Shares of letters, digits, signs and capitals; drop texts that are mostly something else",
    "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
)
class Characters(RowStage):
    """Of text pairs both texts are judged. A text without a character but white space has shares of 0 and stays."""

    drops: ClassVar[bool] = True

    min_letters: float = Field(0.0, ge=0, le=1, description="share of letters that a text must have")
    max_digits: float = Field(1.0, ge=0, le=1, description="share of digits that a text may have")
    max_signs: float = Field(1.0, ge=0, le=1, description="share of punctuation and symbols that a text may have")
    max_capitals: float = Field(1.0, ge=0, le=1, description="share of capitals among the letters of a text")
    max_unwanted: int = Field(0, ge=0, description="control characters and the like that a text may have")

    def needs(self, kind: Kind) -> list[str]:
        return text_fields(kind)

    def makes(self, kind: Kind) -> list[pa.Field]:
        names = ("letters", "digits", "signs", "capitals")
        return [pa.field(f"{text}_{name}", pa.float32()) for text in text_fields(kind) for name in names]

    def run(self, rows: Rows) -> Output:
        columns: dict[str, Any] = {}
        masks: dict[str, list[np.ndarray]] = {}
        for name in text_fields(rows.corpus.kind):
            counts = class_counts(rows.strings(name))
            letters = counts[:, LETTER] + counts[:, CAPITAL]
            total = counts[:, LETTER:].sum(1)
            some = np.maximum(total, 1)
            shares = {
                "letters": letters / some,
                "digits": counts[:, DIGIT] / some,
                "signs": counts[:, SIGN] / some,
                "capitals": counts[:, CAPITAL] / np.maximum(letters, 1),
            }
            columns |= {f"{name}_{each}": share.astype(np.float32) for each, share in shares.items()}
            found = {
                "unwanted_characters": counts[:, UNWANTED] > self.max_unwanted,
                "too_few_letters": (shares["letters"] < self.min_letters) & (total > 0),
                "too_many_digits": shares["digits"] > self.max_digits,
                "too_many_signs": shares["signs"] > self.max_signs,
                "too_many_capitals": shares["capitals"] > self.max_capitals,
            }
            for reason, mask in found.items():
                masks.setdefault(reason, []).append(mask)
        return Output(columns, reasons(len(rows), merged(masks)))
