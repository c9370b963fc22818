"""Texts that say the same again and again: words, phrases, or one character held down.

Shares as in Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", appendix A1:
of the words of a text (and of its phrases, n words in a row) those that stand in it more than once already. A text of
fewer than `min_words` words is not judged by shares: in a caption of four words one that repeats says nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.shingles import Words, blocks, code_points, distinct
from pipelines.stages.base import Output, Rows, RowStage, merged, reasons, text_fields
from pipelines.stages.registry import STAGES


def longest_runs(texts: pa.StringArray) -> np.ndarray:
    """int64 [n]: how often the most often repeated character (white space aside) stands in a row in each text."""
    codes, bounds = code_points(texts)
    if not len(codes):
        return np.zeros(len(texts), np.int64)
    new = np.ones(len(codes), bool)
    new[1:] = codes[1:] != codes[:-1]
    new[bounds[:-1][bounds[:-1] < len(codes)]] = True
    starts = np.flatnonzero(new)
    length = np.diff(np.append(starts, len(codes)))
    length[np.isin(codes[starts], [9, 10, 13, 32, 160])] = 0
    first = np.searchsorted(starts, bounds)
    out = np.zeros(len(texts), np.int64)
    some = np.flatnonzero(np.diff(first))
    out[some] = np.maximum.reduceat(length, first[some])
    return out


@STAGES.register(
    "repetition",
    "Shares of words and phrases that repeat, and the longest run of one character; drop texts above the limits",
    "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
)
class Repetition(RowStage):
    """Of text pairs both texts are judged."""

    drops: ClassVar[bool] = True

    max_words: float = Field(0.5, ge=0, le=1, description="share of words that may be repetitions of an earlier one")
    max_phrases: float = Field(0.3, ge=0, le=1, description="share of phrases that may repeat an earlier one")
    phrase: int = Field(3, ge=2, description="words in a phrase")
    min_words: int = Field(8, ge=1, description="words from which shares are judged")
    max_run: int | None = Field(8, ge=1, description="times that a character may stand in a row")

    def needs(self, kind: Kind) -> list[str]:
        return text_fields(kind)

    def makes(self, kind: Kind) -> list[pa.Field]:
        made = []
        for name in text_fields(kind):
            made += [
                pa.field(f"{name}_repeated_words", pa.float32()),
                pa.field(f"{name}_repeated_phrases", pa.float32()),
            ]
            made.append(pa.field(f"{name}_longest_run", pa.int32()))
        return made

    def run(self, rows: Rows) -> Output:
        columns: dict[str, Any] = {}
        masks: dict[str, list[np.ndarray]] = {}
        for name in text_fields(rows.corpus.kind):
            texts = rows.strings(name)
            parts = [self._shares(block) for block in blocks(texts)]
            count, words, phrases = np.concatenate([np.zeros((0, 3)), *parts]).T
            run = np.concatenate([np.zeros(0, np.int64), *map(longest_runs, blocks(texts))])
            columns[f"{name}_repeated_words"] = words.astype(np.float32)
            columns[f"{name}_repeated_phrases"] = phrases.astype(np.float32)
            columns[f"{name}_longest_run"] = run.astype(np.int32)
            judged = count >= self.min_words
            masks.setdefault("repeated_words", []).append(judged & (words > self.max_words))
            masks.setdefault("repeated_phrases", []).append(judged & (phrases > self.max_phrases))
            if self.max_run is not None:
                masks.setdefault("repeated_character", []).append(run > self.max_run)
        return Output(columns, reasons(len(rows), merged(masks)))

    def _shares(self, texts: pa.StringArray) -> np.ndarray:
        """float64 [n, 3]: number of words, shares of repeated words and phrases."""
        words = Words(texts)
        out = np.zeros((len(texts), 3))
        out[:, 0] = np.diff(words.bounds)
        for column, size in ((1, 1), (2, self.phrase)):
            values, bounds = words.shingles(size)
            total, different = np.diff(bounds), np.diff(distinct(values, bounds)[1])
            out[:, column] = 1 - different / np.maximum(total, 1)
            out[total == 0, column] = 0
        return out
