"""Text pairs from parquet and from JSON lines: one row is one sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import IO, Any, Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from cl.errors import DataError
from pipelines.readers import Record, Rejected, TextSample
from pipelines.readers.tar import parse_object

# Column of a sample -> column of the file, unless the config says otherwise. Without `key` the row's number is the key.
COLUMNS: Final = {"anchor": "anchor", "positive": "positive", "negatives": "negatives", "key": None}
ROWS: Final = 8192  # rows in memory at a time
MAX_LINE_BYTES: Final = 64 << 20


class TextReader:
    """Reads rows with a given meaning of their columns.

    Args:
        columns: `anchor`, `positive`, `negatives`, `key` -> name of the column in the file.
    """

    def __init__(self, columns: dict[str, str]) -> None:
        names = COLUMNS | columns
        self.anchor, self.positive = str(names["anchor"]), str(names["positive"])
        self.negatives, self.key = names["negatives"], names["key"]
        self.used = {self.anchor, self.positive, self.negatives, self.key}
        # Columns the user named must exist; the default `negatives` may be absent.
        self.required = [self.anchor, self.positive, *(n for k, n in columns.items() if k in ("negatives", "key"))]

    def check_parquet(self, file: pq.ParquetFile, url: str) -> None:
        """Refuse a file that lacks a column or has another type in it.

        Raises:
            DataError: naming the column and what the file has.
        """
        schema = file.schema_arrow
        for name in self.required:
            if name not in schema.names:
                raise DataError(missing_column(url, name, schema.names))
        for name in (self.anchor, self.positive):
            kind = schema.field(name).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise DataError(f"{url}: column {name!r} is {kind}, expected text.")
        if self.negatives in schema.names:
            kind = schema.field(self.negatives).type
            if not ((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_text(kind.value_type)):
                raise DataError(f"{url}: column {self.negatives!r} is {kind}, expected a list of texts.")

    def check_jsonl(self, file: IO[bytes], url: str) -> None:
        """Refuse a file whose first JSON object lacks a column.

        Raises:
            DataError: naming the column and what the object has.
        """
        for _, line in zip(range(1000), file, strict=False):
            try:
                row = parse_object(line)
            except ValueError:
                continue
            for name in self.required:
                if name not in row:
                    raise DataError(missing_column(url, name, row))
            return

    def read_parquet(self, file: pq.ParquetFile) -> Iterator[Record]:
        """Every row of a parquet file; columns of nested and binary types do not go into `meta`.

        A row group that cannot be read costs its own rows, each of which is rejected; a value that cannot, its row.
        """
        yield from self._rows(parquet_rows(file, self.negatives))

    def read_jsonl(self, file: IO[bytes]) -> Iterator[Record]:
        """Every line of a JSON lines file; blank lines do not count."""
        yield from self._rows(jsonl_rows(file))

    def _rows(self, rows: Iterable[dict[str, Any] | Rejected]) -> Iterator[Record]:
        seen: set[str] = set()
        for number, row in enumerate(rows):
            if isinstance(row, Rejected):
                yield row._replace(key=str(number))
                continue
            record = self._sample(str(number), row)
            if self.key is not None and isinstance(record, TextSample):
                if record.key in seen:
                    record = Rejected(record.key, "duplicate_key", f"row {number}: an earlier row has this key")
                else:
                    seen.add(record.key)
            yield record

    def _sample(self, key: str, row: dict[str, Any]) -> TextSample | Rejected:
        where = f"row {key}"
        if self.key is not None:
            if row.get(self.key) is None:
                return Rejected(key, "missing_text", f"{where}: {self.key} is null")
            key = str(row[self.key])
        for name in (self.anchor, self.positive):
            value = row.get(name)
            if value is None:
                return Rejected(key, "missing_text", f"{where}: {name} is null")
            if not isinstance(value, str):
                return Rejected(key, "wrong_type", f"{where}: {name} is a {type(value).__name__}, not text")
            if not value.strip():
                return Rejected(key, "empty_text", f"{where}: {name} has no text")
        negatives = row.get(self.negatives) if self.negatives else None
        if negatives is not None:
            if not isinstance(negatives, list) or not all(isinstance(text, str) for text in negatives):
                return Rejected(key, "wrong_type", f"{where}: {self.negatives} is not a list of texts")
            negatives = [text for text in negatives if text.strip()]
        meta = {name: value for name, value in row.items() if name not in self.used}
        text = orjson.dumps(meta, default=str).decode() if meta else None
        return TextSample(key, row[self.anchor].strip(), row[self.positive].strip(), negatives, text)


def parquet_rows(file: pq.ParquetFile, nested: str | None = None) -> Iterator[dict[str, Any] | Rejected]:
    """The rows of a parquet file, or why one cannot be read: columns of plain types, and one that is not."""
    schema = file.schema_arrow
    wanted = [name for name in schema.names if name == nested or _is_plain(schema.field(name).type)]
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if sum(counts) != file.metadata.num_rows or min(counts, default=0) < 0:
        counts = [1] * len(counts)  # a damaged footer: how many rows are lost nobody knows
    for group, rows in enumerate(counts):
        yield from _group_rows(file, group, rows, wanted)


def _group_rows(
    file: pq.ParquetFile, group: int, count: int, columns: list[str]
) -> Iterator[dict[str, Any] | Rejected]:
    """The rows of a row group that holds `count`; those that cannot be read are rejected one by one."""
    read = 0
    try:
        for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns):
            batch.validate()  # offsets that damage has put out of order would be read as they are
            yield from _batch_rows(batch)
            read += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        why = " ".join(str(error).split())[:200]
        for _ in range(read, count):
            yield Rejected(None, "damaged_shard", f"row group {group} cannot be read: {why}")


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Rejected]:
    """The rows of a batch; a value that is none in Python (no UTF-8, a date beyond the calendar) costs its row."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        rows = None
    if rows is not None:
        yield from rows
        return
    for row in range(batch.num_rows):
        values: dict[str, Any] = {}
        try:
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                values[name] = column[row].as_py()
        except UnicodeDecodeError as error:
            yield Rejected(None, "invalid_utf8", f"{name}: {error}")
        except (ValueError, OverflowError, pa.ArrowException) as error:
            yield Rejected(None, "wrong_type", f"{name}: {' '.join(str(error).split())}")
        else:
            yield values


def missing_column(url: str, name: str, names: Iterable[str], fields: Iterable[str] = ("anchor", "positive")) -> str:
    """The sentence for a column that is not there."""
    mapped = " ".join(f"columns.{field}=..." for field in fields)
    return f"{url} has no column {name!r}; it has {', '.join(map(str, names)) or 'none'} (map it with {mapped})."


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_plain(kind: pa.DataType) -> bool:
    """Whether a column holds one readable value a row."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return not (binary or pa.types.is_binary_view(kind) or pa.types.is_nested(kind))


def jsonl_rows(file: IO[bytes]) -> Iterator[dict[str, Any] | Rejected]:
    """The objects of a JSON lines file, or why a line is none."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            yield Rejected(str(number), "oversized_member", f"line {number + 1} is longer than {MAX_LINE_BYTES} bytes")
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            number += 1
            continue
        if not line.strip():
            continue
        try:
            row: dict[str, Any] | Rejected = parse_object(line)
        except ValueError as error:
            try:
                line.decode()
                row = Rejected(str(number), "invalid_json", f"line {number + 1}: {error}")
            except UnicodeDecodeError as broken:
                row = Rejected(str(number), "invalid_utf8", f"line {number + 1}: {broken}")
        yield row
        number += 1
