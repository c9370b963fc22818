"""Texts with words of a list: slurs, pornography, spam, names that must not be learnt.

The lists that most corpora are cleaned with hold a word or phrase a line (the "List of Dirty, Naughty, Obscene, and
Otherwise Bad Words" of C4: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer"). Which list is the user's choice, for it decides whose words are missing from the corpus (Dodge et al.
2021, "Documenting Large Webtext Corpora"); `most` leaves texts alone that hold few. Words match as wholes; see
`word_list.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.stages.base import Output, Rows, merged, reasons, text_fields
from pipelines.stages.registry import STAGES
from pipelines.stages.word_list import Find, WordListStage


@STAGES.register(
    "blocked_words",
    "Drop texts that hold words of a list",
    "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
)
class BlockedWords(WordListStage):
    """Of text pairs both texts are judged."""

    most: int = Field(0, ge=0, description="how many different ones a text may hold")

    def needs(self, kind: Kind) -> list[str]:
        return text_fields(kind)

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field(f"{name}_blocked", pa.int32()) for name in text_fields(kind)]

    def match(self, find: Find, rows: Rows) -> Output:
        columns: dict[str, Any] = {
            f"{name}_blocked": np.fromiter(map(len, find(rows, name)), np.int32, len(rows))
            for name in text_fields(rows.corpus.kind)
        }
        masks = {"blocked_word": [count > self.most for count in columns.values()]}
        return Output(columns, reasons(len(rows), merged(masks)))
