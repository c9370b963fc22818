"""Labels: columns of the light plane that travel with the samples, as tensors by name.

    labels:
      source: source                                     # strings: a stable 63-bit code of each
      cluster: cluster                                   # integers: as they are
      score: {column: score, kind: number}               # float32 [B], or [B, K] of a list
      concept: meta.concept                              # a field of the sample's own metadata
      taxon: taxonomy                                    # a list of strings: levels, int64 [B, L]
      tags: {column: tags, kind: tags, values: [a, b]}   # several at a time: 0 and 1, float32 [B, C]

A code depends on the string alone, so it is the same on all workers, in all corpora and after a resume. With `values`
classes are numbered 0, 1, 2, ... instead. A class that is not known (null) gets a negative code of the sample's own,
which equals no other: such a sample has no class mates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3
from pydantic import Field, model_validator

from cl import storage
from cl.config import Config
from cl.corpus import Corpus
from cl.errors import ConfigError, DataError

META = "meta"  # the column of a sample's own metadata, JSON text
_POSITIVE = 2**63 - 1


class LabelConfig(Config):
    """Where a label comes from."""

    column: str = Field(description="column of the light plane, or meta.FIELD of the samples' own metadata")
    kind: Literal["auto", "class", "number", "tags"] = Field(
        "auto",
        description="class: integers or strings, lists of them are levels; tags: sets; auto: by the values",
    )
    values: list[str | int] | None = Field(
        None, description="classes in the order of their numbers, or the tags that have a column each; null: codes"
    )

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        """`label: column` is short for `label: {column: column}`."""
        return {"column": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _values_fit(self) -> LabelConfig:
        if self.kind == "tags" and not self.values:
            raise ValueError("kind: tags needs values, the tags that have a column each")
        if self.kind == "number" and self.values is not None:
            raise ValueError("values number classes or tags; a number has none")
        return self


def code_of(text: str) -> int:
    """The 63-bit code of a string."""
    return int.from_bytes(blake3(text.encode()).digest(length=8), "little") & _POSITIVE


@dataclass(frozen=True)
class Label:
    """A label whose kind and shape are known.

    Attributes:
        name: as the config calls it.
        column: of the light plane.
        field: of the JSON in that column; None: the column itself.
        kind: class, number or tags.
        width: length of a sample's list, the number of tags, or None for a single value.
        values: value -> number of a class, or column of a tag.
    """

    name: str
    column: str
    field: str | None
    kind: str
    width: int | None
    values: Mapping[str | int, int] | None = None

    @property
    def dtype(self) -> type[np.generic]:
        return np.int64 if self.kind == "class" else np.float32

    def empty(self, rows: int) -> np.ndarray:
        """Zeros for a batch: [rows] or [rows, width]."""
        return np.zeros((rows,) if self.width is None else (rows, self.width), self.dtype)

    def encode(self, table: pa.Table, ids: np.ndarray, where: str) -> np.ndarray:
        """The label of every row of a table: [n] or [n, width].

        Args:
            table: holds the column.
            ids: int64 [n, 2], the samples' ids.
            where: the file, for errors.

        Raises:
            DataError: a value that the label cannot take.
        """
        made = self.empty(len(ids))
        known: dict[Any, Any] = {}
        try:
            values = _values(table, self.column, self.field)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{where}: the column {self.column!r} holds what is no JSON: {error}.") from error
        for row, value in enumerate(values):
            if value is None and self.kind == "class" and self.values is None:
                made[row] = ~(int(ids[row, 0]) & _POSITIVE)
                continue
            key = tuple(value) if isinstance(value, list) else value
            try:
                if key not in known:
                    known[key] = self._one(value)
            except (TypeError, ValueError, OverflowError) as error:
                raise DataError(f"{where}: the label {self.name!r} cannot be {_short(value)}: {error}.") from error
            made[row] = known[key]
        return made

    def _one(self, value: Any) -> Any:
        """What stands in the batch for one sample's value; ValueError and TypeError say why it cannot be."""
        if value is None:
            raise ValueError("every sample needs one")
        if self.kind == "tags":
            tags = np.zeros(self.width or 0, np.float32)
            tags[[self._number(tag) for tag in (value if isinstance(value, list) else [value])]] = 1
            return tags
        if (self.width is None) == isinstance(value, list) or (self.width and len(value) != self.width):
            raise ValueError(f"expected {'one value' if self.width is None else f'a list of {self.width}'}")
        make = self._class if self.kind == "class" else _number
        return [make(each) for each in value] if isinstance(value, list) else make(value)

    def _class(self, value: Any) -> int:
        if self.values is not None:
            return self._number(value)
        if isinstance(value, str):
            return code_of(value)
        if not isinstance(value, int):
            raise TypeError("a class is an integer or a string")
        return int(value)

    def _number(self, value: Any) -> int:
        assert self.values is not None
        if value not in self.values:
            raise ValueError(f"it is none of its values ({_short(list(self.values))})")
        return self.values[value]


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or not np.isfinite(value):
        raise ValueError("expected a finite number")
    return float(value)


def _values(table: pa.Table, column: str, field: str | None) -> list[Any]:
    """The Python values of a column, or of a field of the JSON in it."""
    values = table.column(column).to_pylist()
    if field is None:
        return values
    parsed = [orjson.loads(text) if text else {} for text in values]
    return [each.get(field) if isinstance(each, dict) else None for each in parsed]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def open_labels(configs: Mapping[str, LabelConfig], corpora: Sequence[Corpus]) -> list[Label]:
    """The labels of a run, with kind and shape as the first samples of each corpus have them.

    Raises:
        ConfigError: a column that a corpus does not have, or whose type does not fit.
    """
    found = []
    for name, config in configs.items():
        seen = [_open_label(name, config, corpus) for corpus in corpora]
        for corpus, label in zip(corpora, seen, strict=True):
            if (label.kind, label.width) != (seen[0].kind, seen[0].width):
                raise ConfigError(
                    f"labels.{name}: column {config.column!r} is {_shape(label)} in {corpus.root}, but "
                    f"{_shape(seen[0])} in {corpora[0].root}."
                )
        found.append(seen[0])
    return found


def _shape(label: Label) -> str:
    return f"{label.kind} of one value" if label.width is None else f"{label.kind} of {label.width} values"


def _open_label(name: str, config: LabelConfig, corpus: Corpus) -> Label:
    column, dot, inner = config.column.partition(".")
    field = inner if dot and column == META else None
    column = column if field is not None else config.column
    sample = _first_value(name, column, field, corpus)
    listed = isinstance(sample, list)
    first = sample[0] if isinstance(sample, list) and sample else sample
    kind = config.kind if config.kind != "auto" else ("number" if isinstance(first, float) else "class")
    wanted = {"class": (str, int), "number": (int, float), "tags": (str, int)}[kind]
    if not isinstance(first, wanted):
        raise ConfigError(
            f"labels.{name}: the column {config.column!r} of {corpus.root} holds {_short(sample)}, which is no {kind}; "
            "expected integers, strings, numbers or lists of them."
        )
    values = None if config.values is None else {value: number for number, value in enumerate(config.values)}
    width = len(values or ()) if kind == "tags" else len(sample) if listed else None
    return Label(name, column, field, kind, width, values)


def _first_value(name: str, column: str, field: str | None, corpus: Corpus) -> Any:
    """The first value of a column that is not null, in the first row group that holds rows."""
    fragment = next(each for each in corpus.fragments if each.samples)
    url = corpus.fragment_url(fragment)
    fs, path = storage.open_fs(url)
    try:
        with fs.open(path, "rb") as raw:
            file = pq.ParquetFile(raw)
            columns = file.schema_arrow.names
            if column not in columns:
                raise ConfigError(
                    f"labels.{name} names the column {column!r}, which {corpus.root} does not have; its columns are "
                    f"{', '.join(columns)}."
                )
            for group in (number for number, rows in enumerate(fragment.row_groups) if rows):
                values = _values(file.read_row_group(group, columns=[column]), column, field)
                found = next((value for value in values if value is not None and value != []), None)
                if found is not None:
                    return found
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{url} is not a readable parquet file: {error}.") from error
    where = f"{column}.{field}" if field else column
    raise ConfigError(f"labels.{name}: no sample of {url} has a value in {where!r}.")
