"""One shard of rows in, one fragment and its tar out: the idempotent unit of work of `clew download`.

Rows are fetched side by side and written in their order, so that the same answers give the same bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import IO, Any, ClassVar, Final

import orjson

from cl import storage
from cl.config import config_digest
from cl.corpus import content_hash, sample_id
from cl.tombstones import read_tombstones
from pipelines.images import Unusable, probe
from pipelines.inputs import Shard
from pipelines.readers import ImageSample, Record, Rejected
from pipelines.shards import Task, write_fragment
from pipelines.web import Refused
from pipelines.web.fetch import Client, FetchConfig
from pipelines.web.tables import Row
from pipelines.write import BLOCK, write_sample

VERSION: Final = 1  # raised when the same answers give another fragment
AHEAD: Final = 2  # rows asked for ahead of the one that is written next, for each request at a time


class DownloadTask(Task):
    """Everything a worker needs to fetch one shard; built from and turned into plain data.

    Args:
        number: of the fragment.
        table: the table whose rows these are; its source and name make the ids.
        rows: digest of the rows.
        rows_url: where they are.
        options: kind, max_pixels, chunk_bytes, chunk_rows and `fetch`, the fields of a `FetchConfig`.
    """

    stage: ClassVar[str] = "download"

    def __init__(self, number: int, table: Shard, rows: str, rows_url: str, options: dict[str, Any], out: str) -> None:
        self.table, self.rows, self.rows_url = table, rows, rows_url
        self.fetch = FetchConfig(**options["fetch"])
        keyed = {**options, "fetch": self.fetch.what()}
        parts = {"version": VERSION, "source": table.source, "name": table.name, "rows": rows, "options": keyed}
        self.tar = f"shards/{number:05d}.tar"
        shard = Shard(self.tar, table.source, table.name, "tar", 0, "")
        super().__init__(number, out, shard, options, config_digest(parts))

    def dump(self) -> str:
        names = ("number", "rows", "rows_url", "options", "out")
        return orjson.dumps({"table": self.table.to_dict()} | {name: getattr(self, name) for name in names}).decode()

    @classmethod
    def load(cls, text: str) -> DownloadTask:
        parts = orjson.loads(text)
        return cls(**parts | {"table": Shard(**parts["table"])})

    def products(self, record: dict[str, Any]) -> list[str]:
        return [*super().products(record), *([record["shard"]] if record["samples"] else [])]


def download_shard(task: DownloadTask, processes: int = 1) -> dict[str, Any]:
    """Fetch the rows of one task and return its record.

    Args:
        processes: how many fetch at a time, and so share the rate of a host.

    Raises:
        DataError: the output cannot be written.
    """
    rows = [Row(**row) for row in storage.read_table(task.rows_url).to_pylist()]
    with storage.atomic_write(task.url(task.tar)) as file:
        return write_fragment(task, _records(task, rows, processes, file))


def _records(task: DownloadTask, rows: Sequence[Row], processes: int, file: IO[bytes]) -> Iterator[Record]:
    """Samples, as their bytes are written to a tar, and what is refused; in the order of the rows."""
    position = 0
    with asyncio.Runner() as runner:
        answers = _answers(task, rows, processes)
        try:
            for row in rows:
                answer = runner.run(_next(answers))
                record = _record(task, row, answer, position + BLOCK)
                if isinstance(record, ImageSample) and isinstance(answer, bytes):
                    position += _write(task, row, record, answer, file)
                yield record
        finally:
            runner.run(answers.aclose())
    file.write(bytes(2 * BLOCK))


async def _next(answers: AsyncGenerator[bytes | Refused, None]) -> bytes | Refused:
    return await anext(answers)


async def _answers(task: DownloadTask, rows: Sequence[Row], processes: int) -> AsyncGenerator[bytes | Refused, None]:
    """What came of each row, in their order; a bounded number is asked for ahead."""
    gone = set(read_tombstones(task.out))

    async def answer(row: Row, client: Client) -> bytes | Refused:
        if row.reason is not None:
            return Refused(row.reason, row.detail)
        if sample_id(task.table.source, f"{task.table.name}/{row.key}") in gone:
            return Refused("removed")
        return await client.fetch(row.url or "")

    window: deque[asyncio.Task[bytes | Refused]] = deque()
    async with Client(task.fetch, processes) as client:
        try:
            for row in rows:
                window.append(asyncio.create_task(answer(row, client)))
                if len(window) > AHEAD * task.fetch.concurrency:
                    yield await window.popleft()
            while window:
                yield await window.popleft()
        finally:
            for each in window:
                each.cancel()


def _record(task: DownloadTask, row: Row, answer: bytes | Refused, offset: int) -> ImageSample | Rejected:
    if isinstance(answer, Refused):
        return Rejected(row.key, answer.reason, answer.detail)
    if row.hash is not None:
        name, _, expected = row.hash.partition(":")
        found = hashlib.new(name, answer, usedforsecurity=False).hexdigest()
        if not hmac.compare_digest(found.encode(), expected.encode()):
            return Rejected(row.key, "wrong_hash", f"{name} is {found}, not {expected:.64}")
    info = probe(answer, task.options["max_pixels"])
    if isinstance(info, Unusable):
        return Rejected(row.key, info.reason, info.detail)
    assert row.key is not None
    assert row.text is not None
    return ImageSample(row.key, offset, len(answer), *info, row.text, content_hash(answer), row.meta)


def _write(task: DownloadTask, row: Row, sample: ImageSample, data: bytes, file: IO[bytes]) -> int:
    key = f"{task.table.name}/{sample.key}"
    who = {"id": sample_id(task.table.source, key), "source": task.table.source, "key": key}
    sidecar = {**who, "content": sample.content, "width": sample.width, "height": sample.height}
    meta = orjson.loads(sample.meta or "null")
    return write_sample(file, who | {"format": sample.format, "text": sample.text}, data, sidecar | {"meta": meta})
