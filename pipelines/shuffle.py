"""Rows on their way to many readers: one file a writer, one Arrow record batch a destination.

A reader takes its own batch of every file by a ranged read; the index at the end of a file is some 24 bytes a
destination, so a shuffle of thousands of writers and readers reads little beside its data. Files are written whole or
not at all and their bytes depend on the rows alone, so that a writer can be repeated at any time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import orjson
import pyarrow as pa

from cl import storage
from cl.errors import DataError

DESTINATIONS = b"clew.destinations"
ROWS = b"clew.rows"
EVERYONE = -1  # a destination: the rows go to every reader, and lie in the file once


@dataclass
class Routed:
    """Rows with their destinations.

    Attributes:
        table: n rows.
        to: int [n], the number of the reader that gets each row, or `EVERYONE`.
    """

    table: pa.Table
    to: np.ndarray


def write_routed(url: str, routed: Routed) -> None:
    """Write rows, grouped by destination; rows of one destination keep their order."""
    order = np.argsort(routed.to, kind="stable")
    table = routed.table.take(pa.array(order)).combine_chunks()
    numbers, counts = np.unique(routed.to, return_counts=True)
    ends = np.cumsum(counts)
    metadata = {DESTINATIONS: orjson.dumps(numbers.tolist()), ROWS: str(table.num_rows).encode()}
    schema = table.schema.with_metadata(metadata)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with storage.atomic_write(url) as file, pa.ipc.new_file(file, schema, options=options) as writer:
        for start, count in zip((ends - counts).tolist(), counts.tolist(), strict=True):
            (batch,) = table.slice(start, count).combine_chunks().to_batches()
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))


def read_routed(urls: Iterable[str], destination: int) -> pa.Table:
    """The rows of one destination, and those for everyone, in all files, in the order of the files.

    Raises:
        DataError: a file is missing or damaged, or there is none.
    """
    batches: list[pa.RecordBatch] = []
    schema: pa.Schema | None = None
    for url in urls:
        with _opened(url) as (reader, numbers):
            schema = schema or reader.schema.remove_metadata()
            mine = [numbers.index(each) for each in (EVERYONE, destination) if each in numbers]
            batches += [reader.get_batch(place).replace_schema_metadata(None) for place in mine]
    if schema is None:
        raise DataError("A shuffle has no files to read; delete the run's .nodes folder and run again.")
    return pa.Table.from_batches(batches, schema=schema)


def to_everyone(table: pa.Table) -> Routed:
    """Rows that every reader gets."""
    return Routed(table, np.full(table.num_rows, EVERYONE))


def read_whole(url: str) -> pa.Table:
    """All rows of a file, by destination."""
    with _opened(url) as (reader, _):
        return reader.read_all().replace_schema_metadata(None)


def count_routed(url: str) -> int:
    """Rows of a file, over all destinations."""
    with _opened(url) as (reader, _):
        return int(reader.schema.metadata[ROWS])


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[pa.ipc.RecordBatchFileReader, list[int]]]:
    """A file's reader, and the destination of each of its batches."""
    fs, path = storage.open_fs(url)
    try:
        with fs.open(path, "rb") as file:
            reader = pa.ipc.open_file(file)
            yield reader, orjson.loads(reader.schema.metadata[DESTINATIONS])
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist.") from error
    except pa.ArrowInvalid as error:
        raise DataError(f"{url} is not a readable Arrow file: {error}.") from error
