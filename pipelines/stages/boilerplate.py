"""Texts that are not about anything: addresses, file names, the phrases of web pages.

What alt texts of crawled images hold beside captions (Sharma et al. 2018, "Conceptual Captions", section 3, drop texts
by such patterns; Schuhmann et al. 2021, LAION-400M). Patterns are searched without regard to case, by a linear-time
engine, so that a pattern of the config can be slow on no text.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field, field_validator

from cl.corpus import Kind
from pipelines.stages.base import Output, Rows, RowStage, merged, reasons, text_fields
from pipelines.stages.registry import STAGES

URL: Final = r"\b(?:https?://|ftp://|www\.)\S+|\b[a-z0-9-]+(?:\.[a-z0-9-]+)*\.(?:com|org|net|edu|gov|info|io|co\.uk)\b"
EMAIL: Final = r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
FILE: Final = (
    r"^\s*(?:(?:img|dsc[nf]?|pict?|image|photo|screen ?shot|scan|untitled|p)[ _-]*\d*(?:[ _-]\d+)*|[\w .()-]*"
    r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|pdf))\s*$"
)
MARKUP: Final = r"<\/?[a-z][^<>]*>|&(?:[a-z]+|#\d+);|\{\{.*?\}\}|\[/?(?:url|img|b|i)\b"
PHRASES: Final = (
    r"\bclick (?:here|to enlarge|on the image|for more)\b",
    r"\b(?:image|photo|picture) (?:not available|coming soon|unavailable|may contain)\b",
    r"\bno (?:image|photo|picture)(?: available)?\b",
    r"\ball rights reserved\b",
    r"\blorem ipsum\b",
    r"\b(?:add|return) to (?:cart|basket|wishlist|top)\b",
    r"\b(?:privacy|cookie) policy\b|\bterms (?:of use|and conditions)\b|\baccept (?:all )?cookies\b",
    r"\bplaceholder\b|\bthumbnail (?:for|image)\b|\bdefault (?:image|avatar)\b",
    r"\b(?:subscribe|sign up|log ?in|follow us)\b.*\b(?:newsletter|account|facebook|twitter|instagram)\b",
    r"\bread more\b|\bshare (?:this|on)\b|\bpage \d+ of \d+\b",
)


@STAGES.register(
    "boilerplate",
    "Drop texts with web or mail addresses, markup, file names for captions, or the phrases of web pages",
    "Conceptual Captions: A Cleaned, Hypernymed, Image Alt-text Dataset For Automatic Image Captioning",
)
class Boilerplate(RowStage):
    """Of text pairs both texts are judged. `max_address` leaves long texts alone that mention an address."""

    drops: ClassVar[bool] = True

    max_address: float = Field(
        0.2, ge=0, le=1, description="share of a text's characters that addresses may make up; 0: none"
    )
    markup: bool = Field(True, description="drop texts with tags, entities or template marks")
    files: bool = Field(True, description="drop texts that are the name of a file or a number of the camera")
    phrases: tuple[str, ...] = Field(PHRASES, description="regular expressions (RE2 style) of which none may match")

    @field_validator("phrases")
    @classmethod
    def _compile(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                pl.Series([""]).str.contains(f"(?i){pattern}")
            except pl.exceptions.ComputeError as error:
                reason = str(error).strip().splitlines()[-1]
                raise ValueError(f"phrase {pattern!r} is no regular expression: {reason}") from error
        return value

    def needs(self, kind: Kind) -> list[str]:
        return text_fields(kind)

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field(f"{name}_address", pa.float32()) for name in text_fields(kind)]

    def run(self, rows: Rows) -> Output:
        columns: dict[str, Any] = {}
        masks: dict[str, list[np.ndarray]] = {}
        for name in text_fields(rows.corpus.kind):
            found = self._judge(pl.Series(rows.strings(name)))
            share = found.pop("address")
            columns[f"{name}_address"] = share.astype(np.float32)
            found = {"address": share > self.max_address, **found}
            for reason, mask in found.items():
                masks.setdefault(reason, []).append(mask.astype(bool))
        return Output(columns, reasons(len(rows), merged(masks)))

    def _judge(self, texts: pl.Series) -> dict[str, np.ndarray]:
        """The share of addresses, and a mask for each other reason."""
        text = pl.col("text")
        length = text.str.len_chars()
        bare = text.str.replace_all(f"(?i){EMAIL}", "").str.replace_all(f"(?i){URL}", "").str.len_chars()
        wanted = {"address": 1 - bare / length.clip(1) - (length == 0)}
        if self.markup:
            wanted["markup"] = text.str.contains(f"(?i){MARKUP}")
        if self.files:
            wanted["file_name"] = text.str.contains(f"(?i){FILE}") & (length > 0)
        if self.phrases:
            wanted["boilerplate"] = text.str.contains("(?i)" + "|".join(f"(?:{each})" for each in self.phrases))
        frame = pl.DataFrame({"text": texts}).select(**wanted)
        return {name: frame[name].to_numpy() for name in frame.columns}
