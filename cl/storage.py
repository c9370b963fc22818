"""Files anywhere: local paths and any fsspec URL, written so that a reader never sees half a file.

Local files are written beside their place under a temporary name and renamed; on object stores one put is
atomic already: what is to be put is collected in a local temporary file. Nothing here keeps state.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator
from typing import IO, Any

import fsspec
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from cl.errors import DataError

TEMPORARY = ".tmp-"


def open_fs(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system behind a path or URL and the path within it."""
    try:
        return fsspec.core.url_to_fs(str(url), use_listings_cache=False)  # other processes write files meanwhile
    except (ValueError, ImportError) as error:
        raise DataError(f"{url} cannot be opened: {error}.") from error


def is_local(url: str) -> bool:
    """Whether a path or URL is on a local disk."""
    return isinstance(open_fs(url)[0], LocalFileSystem)


def join(root: str, *parts: str) -> str:
    """Join below a root; a part that is itself absolute or a URL replaces what is before it."""
    path = str(root)
    for part in parts:
        path = str(part) if "://" in str(part) or os.path.isabs(str(part)) else posixpath.join(path, str(part))
    return path


def exists(url: str) -> bool:
    fs, path = open_fs(url)
    return bool(fs.exists(path))


def list_files(url: str, suffix: str = "") -> list[str]:
    """Names (not paths) of the files directly in a folder, sorted, temporary ones left out; [] if there is none."""
    fs, path = open_fs(url)
    try:
        names = [
            entry["name"].rstrip("/").rsplit("/", 1)[-1]
            for entry in fs.ls(path, detail=True)
            if entry["type"] == "file"
        ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name.endswith(suffix) and not name.startswith(TEMPORARY))


@contextlib.contextmanager
def atomic_write(url: str) -> Iterator[IO[bytes]]:
    """Open `url` for writing; it appears whole when the block ends, or not at all if the block raises.

    Raises:
        DataError: the disk is full or the place cannot be written.
    """
    fs, path = open_fs(url)
    try:
        if isinstance(fs, LocalFileSystem):
            folder, name = os.path.split(path)
            os.makedirs(folder or ".", exist_ok=True)
            temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{name}")
            try:
                with open(temporary, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
        else:
            # Not fs.transaction: it belongs to the file system, so that one write within another would end it.
            with tempfile.NamedTemporaryFile(prefix=TEMPORARY) as file:
                yield file
                file.flush()
                fs.put_file(file.name, path)
    except OSError as error:
        raise write_error(url, error) from error


def write_error(url: str, error: OSError) -> DataError:
    """The sentence for a failed write."""
    if error.errno == errno.ENOSPC:
        return DataError(f"{url} cannot be written: no space is left on the disk.")
    return DataError(f"{url} cannot be written: {error.strerror or error}.")


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_write(url) as file:
        file.write(data)


def write_json(url: str, data: Any) -> None:
    """Write JSON atomically, indented, keys in the given order."""
    write_bytes(url, orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def read_json(url: str) -> Any:
    """Read a JSON file.

    Raises:
        DataError: missing or not JSON.
    """
    fs, path = open_fs(url)
    try:
        return orjson.loads(fs.cat_file(path))
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist.") from error
    except orjson.JSONDecodeError as error:
        raise DataError(f"{url} is not valid JSON: {error}.") from error


def write_table(url: str, table: pa.Table, row_group_rows: int | None = None) -> None:
    """Write a parquet file atomically; the bytes depend on the table alone."""
    with atomic_write(url) as file:
        pq.write_table(table, file, compression="zstd", row_group_size=row_group_rows)


def read_table(url: str, columns: list[str] | None = None) -> pa.Table:
    """Read a parquet file.

    Raises:
        DataError: missing, not parquet, or a column is not there.
    """
    with open_parquet(url) as file:
        names = set(file.schema_arrow.names)
        missing = [column for column in columns or () if column not in names]
        if missing:
            raise DataError(f"{url} has no column {missing[0]!r}; it has {', '.join(sorted(names))}.")
        return file.read(columns=columns)


@contextlib.contextmanager
def open_parquet(url: str) -> Iterator[pq.ParquetFile]:
    """Open a parquet file for reading by row group."""
    fs, path = open_fs(url)
    try:
        with fs.open(path, "rb") as raw, pq.ParquetFile(raw) as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist.") from error
    except pa.ArrowInvalid as error:
        raise DataError(f"{url} is not a readable parquet file: {error}.") from error


def sweep_temporary(url: str, deep: bool = False) -> int:
    """Delete what killed writers left directly in a folder, or (`deep`) anywhere below it; returns how many files."""
    if not is_local(url):
        return 0
    swept = 0
    for folder, _, names in os.walk(open_fs(url)[1]):
        for name in names:
            if name.startswith(TEMPORARY):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, name))
                    swept += 1
        if not deep:
            break
    return swept
