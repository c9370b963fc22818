"""Which entries of a list of concepts a text mentions: the first half of MetaCLIP's curation.

Xu et al. 2024, "Demystifying CLIP Data": the list holds the synsets of WordNet and frequent words, phrases and titles
of Wikipedia, some 500,000 entries; a text mentions an entry if the entry is a substring of it after both were padded:
every sign stands between spaces, and so does the whole. All entries are searched at once by an Aho-Corasick automaton,
overlapping ones included. In scripts without spaces there are no words to pad, and an entry is found anywhere (as in
Chuang et al. 2025, "Meta CLIP 2: A Worldwide Scaling Recipe", which matches such languages without boundaries).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, ClassVar

import numpy as np
import polars as pl
import pyarrow as pa
from blake3 import blake3
from pydantic import Field

from cl import storage
from cl.corpus import Kind
from cl.errors import ConfigError
from pipelines.paths import absolute
from pipelines.shingles import word_classes
from pipelines.stages.base import Output, Rows, RowStage, Stage, internal, reasons, text_fields
from pipelines.stages.registry import STAGES


def padded(texts: pl.Series, case: bool = False) -> pl.Series:
    """Texts with every sign, and the whole, between single spaces; lower case unless `case`."""
    spaced = (texts if case else texts.str.to_lowercase()).str.replace_all(r"([\p{P}\p{S}])", " $1 ")
    return " " + spaced.str.replace_all(r"[\s\p{Z}]+", " ").str.strip_chars(" ") + " "


@lru_cache(maxsize=4)
def read_entries(stage: str, url: str, case: bool) -> tuple[str, ...]:
    """The entries of a stage's file, one a line, as they are searched for: padded, each once, in the order of the file.

    Raises:
        ConfigError: there is no such file, it is no text, or it has no entry.
    """
    fs, path = storage.open_fs(url)
    try:
        lines = fs.cat_file(path).decode().splitlines()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"Stage {stage!r}: the list of entries {url} does not exist.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"Stage {stage!r}: the list of entries {url} is not UTF-8 text.") from error
    found = padded(pl.Series(lines, dtype=pl.String), case)
    classes = word_classes()
    entries = [entry.strip() if any(classes[ord(char)] == 2 for char in entry) else entry for entry in found.to_list()]
    out = tuple(dict.fromkeys(entry for entry in entries if entry.strip()))
    if not out:
        raise ConfigError(f"Stage {stage!r}: the list of entries {url} has no entry; it must have one a line.")
    return out


@STAGES.register(
    "entry_match",
    "The entries of a list of concepts that each text mentions; drop texts that mention none",
    "Demystifying CLIP Data",
)
class EntryMatch(RowStage):
    """Writes `entries`, a list of numbers: the place of each entry among the distinct ones of the file."""

    drops: ClassVar[bool] = True
    unkeyed: ClassVar[frozenset[str]] = frozenset({"path"})  # the digest stands for its content

    path: str = Field(description="path or URL of a text file with one entry a line")
    column: str | None = Field(None, description="the text that is searched; None: text, or positive of pairs")
    case: bool = Field(False, description="whether capitals must be the same")
    require: bool = Field(True, description="drop texts that mention no entry")

    def resolve(self, model: str | None, kind: Kind) -> Stage:
        return self.model_copy(update={"path": absolute(self.path)})  # workers may have another working folder

    def digest(self) -> str:
        return blake3("\n".join(read_entries(self.name, self.path, self.case)).encode()).hexdigest(length=16)

    def needs(self, kind: Kind) -> list[str]:
        return [self.column or text_fields(kind)[-1]]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [internal("entries", pa.list_(pa.int32())), pa.field("entry_count", pa.int32())]

    def open(self) -> Callable[[Rows], Output]:
        import ahocorasick_rs

        return partial(self._match, ahocorasick_rs.AhoCorasick(read_entries(self.name, self.path, self.case)))

    def _match(self, automaton: Any, rows: Rows) -> Output:
        texts = padded(pl.Series(rows.strings(self.needs(rows.corpus.kind)[0]), dtype=pl.String), self.case)
        find = automaton.find_matches_as_indexes
        found = [sorted({entry for entry, _, _ in find(text, overlapping=True)}) for text in texts.to_list()]
        count = np.fromiter(map(len, found), np.int32, len(found))
        columns = {"entries": pa.array(found, pa.list_(pa.int32())), "entry_count": count}
        return Output(columns, reasons(len(rows), {"no_entry": (count == 0) & self.require}))
