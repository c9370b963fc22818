"""What stages share that search texts for the words of a list: the list, and how words are told from parts of words.

A text mentions an entry if the entry is a substring of it after both were padded: every sign stands between spaces, and
so does the whole (Xu et al. 2024, "Demystifying CLIP Data"). In scripts without spaces there are no words to pad, and
an entry is found anywhere (as in Chuang et al. 2025, "Meta CLIP 2: A Worldwide Scaling Recipe", which matches such
languages without boundaries). All entries are searched at once by an Aho-Corasick automaton, overlapping ones included.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar

import polars as pl
from blake3 import blake3
from pydantic import Field

from cl import storage
from cl.corpus import Kind
from cl.errors import ConfigError
from pipelines.paths import absolute
from pipelines.shingles import word_classes
from pipelines.stages.base import Output, Rows, RowStage, Stage

Find = Callable[[Rows, str], Iterator[Sequence[int]]]


class WordListStage(RowStage):
    """A stage whose workers hold the automaton of a list."""

    drops: ClassVar[bool] = True
    unkeyed: ClassVar[frozenset[str]] = frozenset({"path"})  # the digest stands for its content

    path: str = Field(description="path or URL of a text file with one word or phrase a line")
    case: bool = Field(False, description="whether capitals must be the same")

    def resolve(self, model: str | None, kind: Kind) -> Stage:
        return self.model_copy(update={"path": absolute(self.path)})  # workers may have another working folder

    def digest(self) -> str:
        return blake3("\n".join(self._entries()).encode()).hexdigest(length=16)

    def open(self) -> Callable[[Rows], Output]:
        import ahocorasick_rs

        return partial(self.match, partial(self._find, ahocorasick_rs.AhoCorasick(self._entries())))

    @abstractmethod
    def match(self, find: Find, rows: Rows) -> Output:
        """Columns and drops; `find(rows, column)` gives the entries of each text, as places in the list, each once."""

    def _entries(self) -> tuple[str, ...]:
        return read_entries(self.name, self.path, self.case)

    def _find(self, automaton: Any, rows: Rows, column: str) -> Iterator[Sequence[int]]:
        for text in padded(pl.Series(rows.strings(column), dtype=pl.String), self.case).to_list():
            yield sorted({entry for entry, _, _ in automaton.find_matches_as_indexes(text, overlapping=True)})


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
