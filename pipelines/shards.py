"""One shard in, one fragment out: the idempotent unit of work of ingest.

`ingest_shard` reads a shard, writes its part of the light plane and of the quarantine, and last a small record that
says so. A record whose key still fits (same shard, size and version, same config) means that nothing is left to do.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Final

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from cl import storage
from cl.config import config_digest
from cl.corpus import QUARANTINE_SCHEMA, Kind, sample_id, sample_schema, text_pair_content
from cl.tombstones import read_tombstones
from pipelines.inputs import Shard
from pipelines.readers import ImageSample, Record, Rejected, TextSample
from pipelines.readers.blocks import BlockReader
from pipelines.readers.tar import TarReader
from pipelines.readers.text import TextReader

# Raised whenever a reader's output changes for the same input, so that old fragments are made anew.
READER_VERSION: Final = 1
UNREADABLE: Final = (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException)  # of a file as a whole
RECORDS: Final = ".ingest"  # folder of the records, within the corpus


class Task:
    """One fragment of a corpus that is being made: its files, and whether they are there.

    Args:
        number: of the fragment.
        out: root of the corpus.
        shard: where its samples come from; source and name make their ids.
        options: `kind`, `chunk_bytes` and `chunk_rows`, and what else the work needs.
        key: changes with anything that changes the output.
    """

    stage: ClassVar[str] = "ingest"  # as the quarantine names it

    def __init__(self, number: int, out: str, shard: Shard, options: dict[str, Any], key: str) -> None:
        self.number, self.out, self.shard, self.options, self.key = number, out, shard, options, key
        self.samples_path = f"samples/{number:05d}.parquet"
        self.quarantine_path = f"quarantine/{number:05d}.parquet"
        self.record_path = f"{RECORDS}/{number:05d}.json"

    def url(self, path: str) -> str:
        return storage.join(self.out, path)

    def fragment_path(self, record: dict[str, Any]) -> str:
        """Where the fragment of a record is: `clew remove` rewrites fragments under other names."""
        return str(record.get("samples_path") or self.samples_path)

    def products(self, record: dict[str, Any]) -> list[str]:
        """The files that belong to a record, within the corpus."""
        kept = (self.fragment_path(record), "samples")
        return [path for path, rows in (kept, (self.quarantine_path, "quarantined")) if record[rows]]

    def done(self) -> dict[str, Any] | None:
        """The record of this very work, if its files are there, else None."""
        if not storage.exists(self.url(self.record_path)):
            return None
        record = storage.read_json(self.url(self.record_path))
        if not isinstance(record, dict) or record.get("key") != self.key:
            return None
        return record if all(storage.exists(self.url(path)) for path in self.products(record)) else None


class IngestTask(Task):
    """Everything a worker needs to ingest one shard; built from and turned into plain data."""

    def __init__(self, number: int, shard: Shard, options: dict[str, Any], out: str) -> None:
        key = config_digest({"reader": READER_VERSION, "shard": shard.to_dict(), "options": options})
        super().__init__(number, out, shard, options, key)

    def dump(self) -> str:
        parts = {"number": self.number, "shard": self.shard.to_dict(), "options": self.options, "out": self.out}
        return orjson.dumps(parts).decode()

    @classmethod
    def load(cls, text: str) -> IngestTask:
        parts = orjson.loads(text)
        return cls(parts["number"], Shard(**parts["shard"]), parts["options"], parts["out"])


def ingest_shard(task: IngestTask) -> dict[str, Any]:
    """Do the work of one task and return its record.

    Raises:
        DataError: the output cannot be written, or a table lacks a column.
    """
    return write_fragment(task, _read(task))


def write_fragment(task: Task, records: Iterable[Record]) -> dict[str, Any]:
    """Write what was read: a fragment, its part of the quarantine, and last the record that says so.

    Raises:
        DataError: the output cannot be written.
    """
    counts: Counter[str] = Counter()
    row_groups: list[int] = []
    rejected: list[Rejected] = []
    read = 0

    gone = set(read_tombstones(task.out))

    def kept() -> Iterator[ImageSample | TextSample]:
        nonlocal read
        for record in records:
            read += 1
            if gone and isinstance(record, (ImageSample, TextSample)):
                key = f"{task.shard.name}/{record.key}"
                if sample_id(task.shard.source, key) in gone:
                    record = Rejected(record.key, "removed", None)
            if isinstance(record, Rejected):
                rejected.append(record)
            else:
                yield record

    chunks = _chunks(kept(), task.options["chunk_bytes"], task.options["chunk_rows"])
    first = next(chunks, None)
    if first is not None:
        kind: Kind = task.options["kind"]
        with (
            storage.atomic_write(task.url(task.samples_path)) as file,
            pq.ParquetWriter(file, sample_schema(kind), compression="zstd") as writer,
        ):
            for chunk in itertools.chain([first], chunks):
                writer.write_table(_sample_table(chunk, task.shard, kind), row_group_size=len(chunk))
                row_groups.append(len(chunk))
    if rejected:
        storage.write_table(task.url(task.quarantine_path), _quarantine_table(rejected, task))
    counts.update(each.reason for each in rejected)
    samples = sum(row_groups)
    if read != samples + len(rejected):
        raise AssertionError(f"{task.shard.url}: {read} records were read but {samples} + {len(rejected)} written")
    record: dict[str, Any] = {
        "key": task.key,
        "number": task.number,
        "shard": task.shard.url,
        "source": task.shard.source,
        "samples": samples,
        "quarantined": len(rejected),
        "reasons": dict(sorted(counts.items())),
        "row_groups": row_groups,
    }
    storage.write_json(task.url(task.record_path), record)
    return record


def _read(task: IngestTask) -> Iterator[Record]:
    shard, options = task.shard, task.options
    try:
        if shard.format == "tar":
            with BlockReader(shard.url) as reader:
                yield from TarReader(options["columns"], options["max_pixels"]).read(reader)
            return
        text = TextReader(options["columns"])
        fs, path = storage.open_fs(shard.url)
        if shard.format == "jsonl":
            with fs.open(path, "rb", compression="infer") as file:
                text.check_jsonl(file, shard.url)
            with fs.open(path, "rb", compression="infer") as file:
                yield from text.read_jsonl(file)
        else:
            with fs.open(path, "rb") as file, pq.ParquetFile(file, page_checksum_verification=True) as table:
                text.check_parquet(table, shard.url)
                yield from text.read_parquet(table)
    except UNREADABLE as error:
        # A file that vanished, lost its rights or is no parquet: the other shards go on without it.
        yield Rejected(None, "unreadable_shard", f"{type(error).__name__}: {error}")


def _chunks(samples: Iterator[Any], chunk_bytes: int, chunk_rows: int) -> Iterator[list[Any]]:
    """Neighbours that are read together: at most so many rows, and so many bytes of the shard from first to last."""
    chunk: list[Any] = []
    for sample in samples:
        if chunk:
            span = sample.offset + sample.length - chunk[0].offset if isinstance(sample, ImageSample) else 0
            if len(chunk) >= chunk_rows or span > chunk_bytes:
                yield chunk
                chunk = []
        chunk.append(sample)
    if chunk:
        yield chunk


def _sample_table(chunk: list[Any], shard: Shard, kind: Kind) -> pa.Table:
    fields = list(zip(*chunk, strict=True))
    names = type(chunk[0])._fields
    columns: dict[str, Any] = dict(zip(names, fields, strict=True))
    columns["key"] = [f"{shard.name}/{key}" for key in columns["key"]]
    columns["id"] = [sample_id(shard.source, key) for key in columns["key"]]
    columns["source"] = [shard.source] * len(chunk)
    columns["shard"] = [shard.url] * len(chunk)
    if kind == "text-text":
        pairs = zip(columns["anchor"], columns["positive"], strict=True)
        columns["content"] = [text_pair_content(anchor, positive) for anchor, positive in pairs]
    schema = sample_schema(kind)
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def _quarantine_table(rejected: list[Rejected], task: Task) -> pa.Table:
    shard = task.shard
    keys = [None if each.key is None else f"{shard.name}/{each.key}" for each in rejected]
    columns = {
        "shard": [shard.url] * len(rejected),
        "key": keys,
        "stage": [task.stage] * len(rejected),
        "reason": [each.reason for each in rejected],
        "detail": [each.detail for each in rejected],
    }
    return pa.table(columns, schema=QUARANTINE_SCHEMA)


def check_columns(task: IngestTask) -> None:
    """Refuse a table whose columns are not those of the config.

    Raises:
        DataError: naming the column and what the file has.
    """
    shard, text = task.shard, TextReader(task.options["columns"])
    fs, path = storage.open_fs(shard.url)
    try:
        if shard.format == "jsonl":
            with fs.open(path, "rb", compression="infer") as file:
                text.check_jsonl(file, shard.url)
        elif shard.format == "parquet":
            with fs.open(path, "rb") as file, pq.ParquetFile(file, page_checksum_verification=True) as table:
                text.check_parquet(table, shard.url)
    except UNREADABLE:
        return  # its task will quarantine it as unreadable
