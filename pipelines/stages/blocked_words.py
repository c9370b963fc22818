"""Texts with words of a list: slurs, pornography, spam, names that must not be learnt.

The lists that most corpora are cleaned with hold a word or phrase a line (the "List of Dirty, Naughty, Obscene, and
Otherwise Bad Words" of C4: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", section 2.2). Which list is the user's choice, for it decides whose words are missing from the corpus
(Dodge et al. 2021, "Documenting Large Webtext Corpora", section 5.3); `most` leaves texts alone that hold few.

Words match as wholes, all of a list at once, as `entry_match` matches concepts; in scripts without spaces anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pyarrow as pa
from blake3 import blake3
from pydantic import Field

from cl.corpus import Kind
from pipelines.paths import absolute
from pipelines.stages.base import Output, Rows, RowStage, Stage, merged, reasons, text_fields
from pipelines.stages.entry_match import padded, read_entries
from pipelines.stages.registry import STAGES


@STAGES.register(
    "blocked_words",
    "Drop texts that hold words of a list",
    "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
)
class BlockedWords(RowStage):
    """Of text pairs both texts are judged."""

    drops: ClassVar[bool] = True
    unkeyed: ClassVar[frozenset[str]] = frozenset({"path"})  # the digest stands for its content

    path: str = Field(description="path or URL of a text file with one word or phrase a line")
    case: bool = Field(False, description="whether capitals must be the same")
    most: int = Field(0, ge=0, description="how many different ones a text may hold")

    def resolve(self, model: str | None, kind: Kind) -> Stage:
        return self.model_copy(update={"path": absolute(self.path)})  # workers may have another working folder

    def digest(self) -> str:
        return blake3("\n".join(read_entries(self.name, self.path, self.case)).encode()).hexdigest(length=16)

    def needs(self, kind: Kind) -> list[str]:
        return text_fields(kind)

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field(f"{name}_blocked", pa.int32()) for name in text_fields(kind)]

    def open(self) -> Callable[[Rows], Output]:
        import ahocorasick_rs

        return partial(self._match, ahocorasick_rs.AhoCorasick(read_entries(self.name, self.path, self.case)))

    def _match(self, automaton: Any, rows: Rows) -> Output:
        columns: dict[str, Any] = {}
        find = automaton.find_matches_as_indexes
        for name in text_fields(rows.corpus.kind):
            texts = padded(pl.Series(rows.strings(name), dtype=pl.String), self.case).to_list()
            found = (len({word for word, _, _ in find(text, overlapping=True)}) for text in texts)
            columns[f"{name}_blocked"] = np.fromiter(found, np.int32, len(texts))
        masks = {"blocked_word": [count > self.most for count in columns.values()]}
        return Output(columns, reasons(len(rows), merged(masks)))
