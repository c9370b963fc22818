"""Reading samples by chunk: the rows of a row group, and the encoded images they point to.

Rows are read by row group and kept, as Arrow, in a cache with a bound. Images on a local disk are read one by one
with pread (the operating system caches them); from anywhere else a chunk's images are fetched in one ranged read,
for they lie together in their shard.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from blake3 import blake3

from cl import storage
from cl.batches.cache import BoundedCache
from cl.batches.labels import Label
from cl.batches.steps import Plan
from cl.batches.stored import StoredView
from cl.corpus import VIEWS, normal_text
from cl.errors import DataError

_OPEN_FILES = 64
_SPARSE = 4  # a ranged read may fetch this many times the bytes it needs


@dataclass(frozen=True)
class ChunkRows:
    """The light plane of one chunk.

    Attributes:
        ids: 128-bit sample ids, int64 [n, 2].
        content: 64 bits of a hash of what each field holds, int64 [n, fields]: the image's bytes, or the text as it is
            compared (`cl.corpus.normal_text`).
        table: the columns that the fields need.
        shard: URL of the chunk's shards and whether it is local, by the name in the column `shard`.
        labels: name -> [n] or [n, K].
        stored: view -> stored embeddings, float32 [n, D].
    """

    ids: np.ndarray
    content: np.ndarray
    table: pa.Table
    shard: dict[str, tuple[str, bool]]
    labels: dict[str, np.ndarray]
    stored: dict[str, np.ndarray]

    def text(self, column: str, row: int) -> str:
        """One string."""
        return self.table.column(column)[row].as_py()

    def texts(self, column: str, row: int) -> list[str] | None:
        """One list of strings."""
        return self.table.column(column)[row].as_py()


def hex_words(column: pa.ChunkedArray) -> np.ndarray:
    """Hashes of 32 hex digits as int64 [n, 2], first half first."""
    digits = "".join(column.to_pylist())
    if len(digits) != 32 * len(column):
        raise DataError("An id or content hash of the corpus does not have 32 hex digits.")
    return np.frombuffer(bytes.fromhex(digits), dtype=">i8").astype(np.int64).reshape(-1, 2)


class CorpusReader:
    """Reads what a plan refers to; safe to share between threads.

    Args:
        plan: whose chunks are read.
        fields: the fields wanted, a subset of the corpus kind's (`cl.corpus.VIEWS`).
        cache_mib: bound on rows and remote image bytes kept in memory, MiB.
        labels: what else is wanted of each sample.
        lists: columns of lists of texts that are wanted.
        stored: embeddings on disk that are wanted.
    """

    def __init__(
        self,
        plan: Plan,
        fields: Sequence[str],
        cache_mib: int = 1024,
        labels: Sequence[Label] = (),
        lists: Sequence[str] = (),
        stored: Sequence[StoredView] = (),
    ) -> None:
        self.plan, self.labels, self.stored = plan, labels, stored
        modalities = VIEWS[plan.kind]
        self._columns = ["id", "content", *(field for field in fields if modalities[field] == "text")]
        if any(modalities[field] == "image" for field in fields):
            self._columns += ["shard", "offset", "length"]
        self._columns = list(dict.fromkeys([*self._columns, *lists]))
        self._fields = [(field, modalities[field]) for field in fields]
        self._rows: BoundedCache[ChunkRows] = BoundedCache(cache_mib * 2**20 // 2)
        self._spans: BoundedCache[dict[str, tuple[int, bytes]]] = BoundedCache(cache_mib * 2**20 // 2)
        self._footers: BoundedCache[pq.FileMetaData] = BoundedCache(256)
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()
        self._files_lock = threading.Lock()

    def rows(self, chunk: int) -> ChunkRows:
        """The light plane of a chunk.

        Raises:
            DataError: the fragment is missing, broken, or not the one the manifest describes.
        """
        return self._rows.get(chunk, lambda: self._read_rows(chunk))

    def image(self, chunk: int, row: int) -> bytes:
        """The encoded image of one sample; shorter than its length if the shard is cut off.

        Raises:
            DataError: the shard is missing.
        """
        rows = self.rows(chunk)
        url, local = rows.shard[rows.text("shard", row)]
        offset, length = int(rows.table["offset"][row].as_py()), int(rows.table["length"][row].as_py())
        if local:
            return os.pread(self._file(url).fileno(), length, offset)
        spans = self._spans.get(chunk, lambda: self._read_spans(rows))
        if url in spans:
            start, data = spans[url]
            return data[offset - start : offset - start + length]
        return _fetch(url, offset, offset + length)

    def key(self, chunk: int, row: int) -> tuple[str, str]:
        """Shard and key of one sample, for the quarantine."""
        table = self._read_columns(chunk, ["shard", "key"])
        return table["shard"][row].as_py(), table["key"][row].as_py()

    def _read_columns(self, chunk: int, columns: list[str]) -> pa.Table:
        where = self.plan.chunk(chunk)
        corpus = self.plan.corpora[where.corpus]
        fragment = corpus.fragments[where.fragment]
        url = corpus.fragment_url(fragment)
        fs, path = storage.open_fs(url)
        try:
            with fs.open(path, "rb") as raw:
                footer = self._footers.get(url, lambda: (pq.read_metadata(raw), 1))
                table = pq.ParquetFile(raw, metadata=footer).read_row_group(where.row_group, columns=columns)
        except FileNotFoundError as error:
            raise DataError(f"{url} does not exist.") from error
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{url} is not a readable parquet file: {error}.") from error
        missing = [column for column in columns if column not in table.column_names]
        if missing:
            raise DataError(f"{url} has no column {missing[0]!r}.")
        if table.num_rows != where.rows:
            raise DataError(
                f"{url} has {table.num_rows} rows in row group {where.row_group}, but corpus.json says {where.rows}."
            )
        return table

    def _read_rows(self, chunk: int) -> tuple[ChunkRows, int]:
        table = self._read_columns(chunk, list(dict.fromkeys([*self._columns, *(each.column for each in self.labels)])))
        ids = hex_words(table["id"])
        content = np.empty((len(ids), len(self._fields)), np.int64)
        for number, (field, modality) in enumerate(self._fields):
            content[:, number] = self._content(table, field, modality)
        where = self.plan.chunk(chunk)
        corpus = self.plan.corpora[where.corpus]
        url = corpus.fragment_url(corpus.fragments[where.fragment])
        labels = {each.name: each.encode(table, ids, url) for each in self.labels}
        shard: dict[str, tuple[str, bool]] = {}
        for name in pc.unique(table["shard"]).to_pylist() if "shard" in table.column_names else ():
            place = corpus.shard_url(name)
            shard[name] = (place, storage.is_local(place))
        keys = table["id"].to_pylist() if self.stored else []
        stored = {each.name: each.read(where.corpus, where.fragment, keys) for each in self.stored}
        light = table.select([name for name in self._columns if name not in ("id", "content")]).combine_chunks()
        held = light.nbytes + ids.nbytes + content.nbytes
        held += sum(value.nbytes for value in [*labels.values(), *stored.values()])
        return ChunkRows(ids, content, light, shard, labels, stored), int(held)

    def _content(self, table: pa.Table, field: str, modality: str) -> np.ndarray:
        if modality == "image":
            return hex_words(table["content"])[:, 0]
        digests = (blake3(normal_text(text).encode()).digest(length=8) for text in table[field].to_pylist())
        return np.frombuffer(b"".join(digests), dtype=">i8").astype(np.int64)

    def _read_spans(self, rows: ChunkRows) -> tuple[dict[str, tuple[int, bytes]], int]:
        """The stretch of each remote shard that holds a chunk's images, where it is not mostly other bytes."""
        spans: dict[str, tuple[int, bytes]] = {}
        for name, (url, local) in rows.shard.items():
            if local:
                continue
            mine = rows.table.filter(pc.equal(rows.table["shard"], name))
            starts = mine["offset"].to_numpy()
            stops = starts + mine["length"].to_numpy()
            low, high = int(starts.min()), int(stops.max())
            if high - low <= _SPARSE * int((stops - starts).sum()):
                spans[url] = (low, _fetch(url, low, high))
        return spans, sum(len(data) for _, data in spans.values())

    def _file(self, url: str) -> IO[bytes]:
        """An open local file; one that is dropped closes when its last reader lets go of it."""
        with self._files_lock:
            if url in self._files:
                self._files.move_to_end(url)
                return self._files[url]
            try:
                file = open(storage.open_fs(url)[1], "rb", buffering=0)  # noqa: SIM115 - kept open
            except FileNotFoundError as error:
                raise DataError(f"Shard {url} does not exist.") from error
            except OSError as error:
                raise DataError(f"Shard {url} cannot be read: {error.strerror}.") from error
            self._files[url] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file


def _fetch(url: str, start: int, stop: int) -> bytes:
    fs, path = storage.open_fs(url)
    try:
        return fs.cat_file(path, start=start, end=stop)
    except FileNotFoundError as error:
        raise DataError(f"Shard {url} does not exist.") from error
    except OSError as error:
        raise DataError(f"Shard {url} cannot be read: {error}.") from error
