"""Captions from one template: texts that are the same but for their numbers, of which a few are kept.

"Photo 17 of 250", "Lot 4711: plate, 30 x 20 cm": crawled pages fill templates, and thousands of texts teach a model the
template. A text's template is the text in lower case with every number replaced by one sign and white space made plain;
Changpinyo et al. 2021, "Conceptual 12M", replace and count in the same way. Of a template with more than `max_texts`
samples, those with the smallest keyed hashes of their ids stay.
"""

from __future__ import annotations

from typing import ClassVar, Final, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import xxhash
from pydantic import Field

from cl.corpus import Kind
from pipelines.keyed import id_words, keyed_hash
from pipelines.shuffle import Routed
from pipelines.stages.base import Output, Rows, reasons, text_fields
from pipelines.stages.keyed import Inbox, KeyedStage, Round, Streams, fragment_of, place_of, references
from pipelines.stages.registry import STAGES

NUMBER: Final = r"\d+(?:[.,:/ -]\d+)*"
ROWS = pa.schema([("template0", pa.uint64()), ("template1", pa.uint64()), ("coin", pa.uint64()),
                  ("id0", pa.uint64()), ("id1", pa.uint64()), ("ref", pa.int64())])  # fmt: skip
VERDICTS = pa.schema([("row", pa.int32()), ("count", pa.int64()), ("kept", pa.bool_())])


def templates(texts: pa.StringArray) -> list[str]:
    """The template of each text."""
    series = pl.Series(texts, dtype=pl.String).str.to_lowercase().str.replace_all(NUMBER, "0")
    return series.str.replace_all(r"\s+", " ").str.strip_chars().to_list()


@STAGES.register(
    "caption_template",
    "Keep a few samples of each template: texts that are the same but for their numbers",
    "Conceptual 12M: Pushing Web-Scale Image-Text Pre-Training To Recognize Long-Tail Visual Concepts",
)
class CaptionTemplate(KeyedStage):
    """Of text pairs the anchor counts. A task holds 48 bytes a row of its partition, which is the template's."""

    drops: ClassVar[bool] = True
    seeded: ClassVar[bool] = True
    frozen: ClassVar[Literal["rows"]] = "rows"
    sends: ClassVar[tuple[str, ...]] = ("rows",)

    max_texts: int = Field(10, ge=1, description="samples that a template keeps")
    column: str | None = Field(None, description="the text that is looked at; None: text, or anchor of pairs")

    def needs(self, kind: Kind) -> list[str]:
        return [self.column or text_fields(kind)[0]]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field("template_count", pa.int64())]

    def partial(self, rows: Rows, partitions: int) -> Streams:
        found = templates(rows.strings(self.needs(rows.corpus.kind)[0]))
        digests = b"".join(xxhash.xxh3_128_digest(text.encode()) for text in found)
        template = np.frombuffer(digests, np.uint64).reshape(-1, 2)
        ids = rows.table["id"].to_pylist()
        words = id_words(ids)
        coin = keyed_hash(rows.seed, ids, "caption_template")
        table = pa.table(
            [template[:, 0], template[:, 1], coin, words[:, 0], words[:, 1], references(rows)], schema=ROWS
        )
        return {"rows": Routed(table, (template[:, 0] % np.uint64(partitions)).astype(np.int64))}

    def rounds(self) -> list[Round]:
        return [Round("count", "partitions", ("rows",), ("verdicts",), self._count)]

    def _count(self, inbox: Inbox) -> Streams:
        t0, t1, coin, id0, id1, ref = (column.to_numpy() for column in inbox.streams["rows"].columns)
        order = np.lexsort((id1, id0, coin, ~inbox.standing(ref), t1, t0))  # rows that stand come first, and count
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(t0[order]) != 0) | (np.diff(t1[order]) != 0)
        starts = np.flatnonzero(new)
        sizes = np.diff(np.append(starts, len(order)))
        within = np.arange(len(order)) - np.repeat(starts, sizes)
        verdicts = pa.table([place_of(ref[order]), np.repeat(sizes, sizes), within < self.max_texts], schema=VERDICTS)
        return {"verdicts": Routed(verdicts, fragment_of(ref[order]))}

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        ordered = reduced.sort_by("row")
        over = ~ordered["kept"].to_numpy(zero_copy_only=False)
        return Output({"template_count": ordered["count"]}, reasons(len(rows), {"template_over_cap": over}))
