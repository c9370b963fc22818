"""Tables of URLs -> shards of rows: each row is to be fetched, or is refused already.

A table is read once by one task, which cuts it into shards of a fixed number of rows, so that fetching a shard needs
nothing else; a record says how many there are and what is in them.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from typing import IO, Any, Final, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

from cl import storage
from cl.config import config_digest
from cl.errors import DataError
from pipelines.inputs import Shard
from pipelines.readers import Rejected
from pipelines.readers.text import MAX_LINE_BYTES, jsonl_rows, missing_column, parquet_rows
from pipelines.shards import UNREADABLE

TABLES: Final = ".download"  # folder of the shards of rows and of their records, within the corpus
VERSION: Final = 1  # raised when the same table gives other shards
COLUMNS: Final = {"url": "url", "text": "text", "key": None, "sha256": None, "md5": None}
HASHES: Final = ("sha256", "md5")
ROWS: Final = pa.schema(
    [
        pa.field("key", pa.string()),  # of the sample, within its table
        pa.field("url", pa.string()),
        pa.field("text", pa.string()),
        pa.field("hash", pa.string()),  # "sha256:..." or "md5:...", hex digits
        pa.field("meta", pa.string()),  # the row's other columns, JSON
        pa.field("reason", pa.string()),  # why the row is not fetched at all
        pa.field("detail", pa.string()),
    ]
)


class Row(NamedTuple):
    """A row of `ROWS`."""

    key: str | None
    url: str | None = None
    text: str | None = None
    hash: str | None = None
    meta: str | None = None
    reason: str | None = None
    detail: str | None = None


class TableTask:
    """Cut one table into shards.

    Args:
        number: of the table.
        options: `columns` and `shard_rows`.
        out: root of the corpus.
    """

    def __init__(self, number: int, table: Shard, options: dict[str, Any], out: str) -> None:
        self.number, self.table, self.options, self.out = number, table, options, out
        self.key = config_digest({"version": VERSION, "table": table.to_dict(), "options": options})
        self.record_url = storage.join(out, TABLES, f"{number:05d}.json")

    def dump(self) -> str:
        parts = {"number": self.number, "table": self.table.to_dict(), "options": self.options, "out": self.out}
        return orjson.dumps(parts).decode()

    @classmethod
    def load(cls, text: str) -> TableTask:
        parts = orjson.loads(text)
        return cls(parts["number"], Shard(**parts["table"]), parts["options"], parts["out"])

    def rows_url(self, shard: int) -> str:
        return storage.join(self.out, TABLES, f"{self.number:05d}-{shard:05d}.parquet")

    def done(self) -> dict[str, Any] | None:
        """The record of this very table, else None; its shards may be gone, once they are fetched."""
        if not storage.exists(self.record_url):
            return None
        record = storage.read_json(self.record_url)
        return record if isinstance(record, dict) and record.get("key") == self.key else None


def cut_table(task: TableTask) -> dict[str, Any]:
    """Write the shards of a table and return its record: `shards` is a digest of the rows of each.

    Raises:
        DataError: the table lacks a column, or the output cannot be written.
    """
    digests: list[str] = []
    rows = read_rows(task.table, task.options["columns"])
    while part := list(itertools.islice(rows, task.options["shard_rows"])):
        table = pa.Table.from_pylist([row._asdict() for row in part], schema=ROWS)
        storage.write_table(task.rows_url(len(digests)), table)
        digests.append(blake3(orjson.dumps(list(map(list, part)))).hexdigest(length=16))
    record = {"key": task.key, "number": task.number, "shards": digests}
    storage.write_json(task.record_url, record)
    return record


def check_table(table: Shard, columns: dict[str, str]) -> None:
    """Refuse a table that lacks a column, from its first row.

    Raises:
        DataError: naming the column and what the file has.
    """
    next(read_rows(table, columns), None)


def read_rows(table: Shard, columns: dict[str, str]) -> Iterator[Row]:
    """The rows of a table in their order.

    Args:
        columns: `url`, `text`, `key`, `sha256`, `md5` -> column of the table.

    Raises:
        DataError: the table lacks a column.
    """
    fs, path = storage.open_fs(table.url)
    try:
        if table.format == "parquet":
            with fs.open(path, "rb") as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                _require(table.url, columns, parquet.schema_arrow.names)
                yield from _rows(parquet_rows(parquet), columns)
            return
        with fs.open(path, "rb", compression="infer") as file:
            if table.format == "jsonl":
                yield from _rows(_checked(jsonl_rows(file), table.url, columns), columns)
            else:
                yield from _rows(csv_rows(file, table, columns), columns)
    except UNREADABLE as error:
        yield Row(None, reason="unreadable_shard", detail=f"{type(error).__name__}: {error}")


def csv_rows(file: IO[bytes], table: Shard, columns: dict[str, str]) -> Iterator[dict[str, Any] | Rejected]:
    """The rows of a csv or tsv file with a head line; a row with too many or too few fields is refused."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(lines, delimiter="," if table.format == "csv" else "\t")
    head = next(reader, None)
    if head is None:
        return
    _require(table.url, columns, head)
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield Rejected(None, "wrong_type", f"line {reader.line_num}: {error}")
            continue
        if fields is None:
            return
        if not fields:
            continue  # a blank line
        if len(fields) != len(head):
            yield Rejected(None, "wrong_type", f"line {reader.line_num} has {len(fields)} fields, not {len(head)}")
        elif any("\udc80" <= sign <= "\udcff" for field in fields for sign in field if not field.isascii()):
            yield Rejected(None, "invalid_utf8", f"line {reader.line_num}")
        else:
            yield {name: value if value != "" else None for name, value in zip(head, fields, strict=True)}


def _named(columns: dict[str, str]) -> dict[str, str]:
    return {name: column for name, column in (COLUMNS | columns).items() if column is not None}


def _require(url: str, columns: dict[str, str], names: Iterable[str]) -> None:
    for column in _named(columns).values():
        if column not in names:
            raise DataError(missing_column(url, column, names, ("url", "text")))


def _checked(
    rows: Iterator[dict[str, Any] | Rejected], url: str, columns: dict[str, str]
) -> Iterator[dict[str, Any] | Rejected]:
    """JSON lines, of which the first object must have all columns."""
    known = False
    for row in rows:
        if not known and not isinstance(row, Rejected):
            _require(url, columns, row)
            known = True
        yield row


def _rows(rows: Iterable[dict[str, Any] | Rejected], columns: dict[str, str]) -> Iterator[Row]:
    named = _named(columns)
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if isinstance(row, Rejected):
            yield Row(str(number), reason=row.reason, detail=row.detail)
            continue
        found = _row(str(number), row, named)
        if "key" in named and found.reason is None:
            if found.key in seen:
                found = Row(found.key, reason="duplicate_key", detail=f"row {number}: an earlier row has this key")
            elif found.key is not None:
                seen.add(found.key)
        yield found


def _row(key: str, row: dict[str, Any], named: dict[str, str]) -> Row:
    where = f"row {key}"
    if "key" in named:
        value = row.get(named["key"])
        if value is None or str(value) == "":
            return Row(key, reason="missing_key", detail=f"{where}: {named['key']} is null")
        key = str(value)
    texts: dict[str, str] = {}
    for name in ("url", "text"):
        value = row.get(named[name])
        if value is None:
            reason = "missing_url" if name == "url" else "missing_caption"
            return Row(key, reason=reason, detail=f"{where}: {named[name]} is null")
        if not isinstance(value, str):
            detail = f"{where}: {named[name]} is a {type(value).__name__}, not text"
            return Row(key, reason="wrong_type", detail=detail)
        texts[name] = value.strip()
    if not texts["text"]:
        return Row(key, reason="empty_caption", detail=f"{where}: {named['text']} has no text")
    expected = None
    for name in HASHES:
        if name in named:
            value = row.get(named[name])
            if not isinstance(value, str) or not value.strip():
                return Row(key, reason="missing_hash", detail=f"{where}: {named[name]}")
            expected = f"{name}:{value.strip().lower()}"
            break
    meta = {name: value for name, value in row.items() if name not in (named["text"], named.get("key"))}
    return Row(key, texts["url"], texts["text"], expected, orjson.dumps(meta, default=str).decode())
