"""Which entries of a list of concepts a text mentions: the first half of MetaCLIP's curation.

Xu et al. 2024, "Demystifying CLIP Data": the list holds the synsets of WordNet and frequent words, phrases and titles
of Wikipedia, some 500,000 entries. `word_list.py` says what it is to mention one.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.stages.base import Output, Rows, internal, reasons, text_fields
from pipelines.stages.registry import STAGES
from pipelines.stages.word_list import Find, WordListStage


@STAGES.register(
    "entry_match",
    "The entries of a list of concepts that each text mentions; drop texts that mention none",
    "Demystifying CLIP Data",
)
class EntryMatch(WordListStage):
    """Writes `entries`, a list of numbers: the place of each entry among the distinct ones of the file."""

    column: str | None = Field(None, description="the text that is searched; None: text, or positive of pairs")
    require: bool = Field(True, description="drop texts that mention no entry")

    def needs(self, kind: Kind) -> list[str]:
        return [self.column or text_fields(kind)[-1]]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [internal("entries", pa.list_(pa.int32())), pa.field("entry_count", pa.int32())]

    def match(self, find: Find, rows: Rows) -> Output:
        found = list(find(rows, self.needs(rows.corpus.kind)[0]))
        count = np.fromiter(map(len, found), np.int32, len(found))
        columns = {"entries": pa.array(found, pa.list_(pa.int32())), "entry_count": count}
        return Output(columns, reasons(len(rows), {"no_entry": (count == 0) & self.require}))
