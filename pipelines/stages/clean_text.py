"""The text as it should be trained on: encoding repaired, personal data replaced, white space made plain.

Repair is ftfy's `fix_text` (Speer 2019, "ftfy"): mojibake, entities, control characters, ligatures and full-width
forms. Personal data are found by pattern: mail addresses, telephone numbers (international with a plus, or ten digits
in the American groups) and addresses of IP version 4 and 6; a name or a street is not found. The corpus's own text
stays as it is: the result is a column of its own, which other stages can be told to read and `write.replace` puts in
place of the text in the curated corpus.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.stages.base import Output, Rows, RowStage, merged, reasons, text_fields
from pipelines.stages.boilerplate import EMAIL
from pipelines.stages.registry import STAGES

# Printable ASCII without the ampersand that starts an entity: what ftfy leaves as it is.
PLAIN: Final = r"^[\n -%'-~]*$"
_BYTE: Final = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IP: Final = (
    rf"\b{_BYTE}(?:\.{_BYTE}){{3}}\b|\b(?:[0-9a-f]{{1,4}}:){{7}}[0-9a-f]{{1,4}}\b"
    r"|\b(?:[0-9a-f]{1,4}:){1,6}(?::[0-9a-f]{1,4}){1,6}\b"
)
PHONE: Final = r"\+\d[\d ()./-]{6,18}\d\b|(?:\(\d{3}\) ?|\b\d{3}[ .-])\d{3}[ .-]\d{4}\b"
SPACES: Final = r"[\s\p{Z}]+"


def repaired(texts: pl.Series) -> pl.Series:
    """Texts as ftfy leaves them; those that it cannot change are not given to it."""
    import ftfy

    suspects = ~texts.str.contains(PLAIN)
    if not suspects.any():
        return texts
    fixed = pl.Series([ftfy.fix_text(text) for text in texts.filter(suspects)], dtype=pl.String)
    return texts.scatter(suspects.arg_true(), fixed)


@STAGES.register(
    "clean_text",
    "A column with the repaired text, personal data replaced by marks; made the text itself by write.replace",
    "ftfy: fixes text for you",
)
class CleanText(RowStage):
    """Writes `text_clean` and `text_marks`, the number of marks put in; of pairs `anchor_...` and `positive_...`."""

    drops: ClassVar[bool] = True

    repair: bool = Field(True, description="repair the encoding with ftfy")
    email: str | None = Field("<email>", description="what stands for a mail address; null leaves addresses alone")
    phone: str | None = Field("<phone>", description="what stands for a telephone number; null leaves numbers alone")
    ip: str | None = Field("<ip>", description="what stands for an IP address; null leaves addresses alone")
    spaces: bool = Field(True, description="make each run of white space one space, none at the ends")
    max_marks: int | None = Field(None, ge=0, description="marks in a text above which the sample is dropped")

    def needs(self, kind: Kind) -> list[str]:
        return text_fields(kind)

    def makes(self, kind: Kind) -> list[pa.Field]:
        made = []
        for name in text_fields(kind):
            made += [pa.field(f"{name}_clean", pa.string()), pa.field(f"{name}_marks", pa.int32())]
        return made

    def run(self, rows: Rows) -> Output:
        columns: dict[str, Any] = {}
        masks: dict[str, list[np.ndarray]] = {}
        for name in text_fields(rows.corpus.kind):
            texts = pl.Series(rows.strings(name), dtype=pl.String)
            if self.repair:
                texts = repaired(texts)
            marks = np.zeros(len(rows), np.int32)
            for pattern, mark in ((EMAIL, self.email), (IP, self.ip), (PHONE, self.phone)):
                if mark is not None:
                    marks += texts.str.count_matches(f"(?i){pattern}").to_numpy().astype(np.int32)
                    texts = texts.str.replace_all(f"(?i){pattern}", mark.replace("$", "$$"))
            if self.spaces:
                texts = texts.str.replace_all(SPACES, " ").str.strip_chars()
            columns |= {f"{name}_clean": texts.to_arrow().cast(pa.string()), f"{name}_marks": marks}
            if self.max_marks is not None:
                masks.setdefault("personal_data", []).append(marks > self.max_marks)
            masks.setdefault("empty_text", []).append((texts.str.len_bytes() == 0).to_numpy())
        return Output(columns, reasons(len(rows), merged(masks)))
