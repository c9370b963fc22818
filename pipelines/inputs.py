"""Which shards a list of paths, folders, globs and URLs stands for.

    shards = find_shards(["data/{00000..00127}.tar"], kind="auto", source=None)

A shard gets a *source* and a *name*, and a sample's key in its source is `name/key-in-shard`: the same key in two
shards is two samples. Unless the config gives a source, it is the file's name without its shard number
(`emoji-00003.tar` -> `emoji`), or the folder's if nothing else is left (`laion/00003.tar` -> `laion`).
"""

from __future__ import annotations

import itertools
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cl.corpus import Kind
from cl.errors import DataError
from cl.storage import TEMPORARY, open_fs

Format = Literal["tar", "parquet", "jsonl", "csv", "tsv"]
SUFFIXES: Final[dict[str, Format]] = {
    ".tar": "tar",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson.gz": "jsonl",
}
# What lists URLs (`clew download`).
TABLES: Final[dict[str, Format]] = {
    **{suffix: form for suffix, form in SUFFIXES.items() if form != "tar"},
    **{f".{form}{packed}": form for form in ("csv", "tsv") for packed in ("", ".gz")},
}
KINDS: Final[dict[Format, Kind]] = {"tar": "image-text", "parquet": "text-text", "jsonl": "text-text"}
_COMPRESSED_TAR = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz)$", re.I)
_MAGIC = re.compile(r"[*?\[]")
_BRACE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Shard:
    """One input file, as a task needs it."""

    url: str  # absolute path or URL, as it stands in the corpus
    source: str
    name: str  # path below its input without the suffix; part of every key
    format: Format
    size: int  # bytes
    version: str  # modification time or entity tag: changes with the content

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_shards(inputs: list[str], kind: Kind | Literal["auto"], source: str | None) -> tuple[list[Shard], Kind]:
    """All shards in the order of the inputs, each folder or glob in natural order, and the kind of corpus they make.

    Raises:
        DataError: nothing there, nothing readable, mixed kinds, or two shards whose samples would get the same ids.
    """
    shards = [shard for each in inputs for shard in _expand(each, kind, source, SUFFIXES)]
    kinds = {KINDS[shard.format] for shard in shards}
    if len(kinds) > 1:
        raise DataError(
            f"The inputs hold both tars (image-text) and tables (text-text), such as {shards[0].url} and "
            f"{next(s.url for s in shards if KINDS[s.format] != KINDS[shards[0].format])}: ingest them separately."
        )
    found = kinds.pop()
    if kind not in ("auto", found):
        wanted = "tars" if kind == "image-text" else "parquet or jsonl files"
        raise DataError(f"{shards[0].url}: a corpus of kind {kind} is made of {wanted}.")
    _refuse_equal_names(shards)
    return shards, found


def find_tables(inputs: list[str], source: str | None) -> list[Shard]:
    """All tables of URLs in the order of the inputs, each folder or glob in natural order.

    Raises:
        DataError: nothing there, nothing readable, or two tables whose samples would get the same ids.
    """
    tables = [table for each in inputs for table in _expand(each, "auto", source, TABLES)]
    _refuse_equal_names(tables)
    return tables


def _refuse_equal_names(shards: list[Shard]) -> None:
    seen: dict[tuple[str, str], Shard] = {}
    for shard in shards:
        other = seen.setdefault((shard.source, shard.name), shard)
        if other is not shard:
            raise DataError(
                f"Shards {other.url} and {shard.url} are both {shard.name!r} of source {shard.source!r}, so their "
                f"samples would get the same ids: give the folder above both as one input, or ingest them separately."
            )


def _expand(pattern: str, kind: str, source: str | None, suffixes: dict[str, Format]) -> Iterator[Shard]:
    fs, path = open_fs(pattern)
    local = isinstance(fs, LocalFileSystem)
    if local:
        path = os.path.abspath(os.path.expanduser(pattern.removeprefix("file://")))
    try:
        if _BRACE.search(path):
            files, base = list(_braces(path)), posixpath.dirname(path[: path.index("{")])
            missing = next((file for file in files if not fs.isfile(file)), None)
            if missing is not None:
                raise DataError(f"Input {pattern}: {missing} does not exist.")
        elif _MAGIC.search(path) and not fs.exists(path):
            files = [file for file in fs.glob(path) if _format(file, suffixes)]
            base = posixpath.dirname(path[: _MAGIC.search(path).start()])  # type: ignore[union-attr]
            if not files:
                raise DataError(f"Input {pattern} matches no {' or '.join(suffixes)} file.")
        elif fs.isdir(path):
            files, base = _folder(fs, path, pattern, kind, suffixes), path.rstrip("/")
        elif fs.isfile(path):
            files, base = [path], posixpath.dirname(path)
        else:
            raise DataError(f"Input {pattern} does not exist.")
        for file in sorted(files, key=_natural) if len(files) > 1 else files:
            yield _shard(fs, file, base, source, local, suffixes)
    except OSError as error:
        raise DataError(f"Input {pattern} cannot be read: {error.strerror or error}.") from error


def _folder(
    fs: fsspec.AbstractFileSystem, path: str, pattern: str, kind: str, suffixes: dict[str, Format]
) -> list[str]:
    if fs.isfile(posixpath.join(path, "corpus.json")):
        raise DataError(f"Input {pattern} is a corpus already: it can be curated and trained on as it is.")
    names = fs.find(path)
    files = [
        name for name in names if _format(name, suffixes) and not posixpath.basename(name).startswith((TEMPORARY, "."))
    ]
    if kind != "auto":
        files = [name for name in files if KINDS[_format(name, suffixes) or "tar"] == kind]
    if not files:
        packed = next((name for name in names if _COMPRESSED_TAR.search(name)), None)
        if packed is not None:
            raise DataError(_compressed(packed))
        raise DataError(f"Input {pattern} is a folder without any {' or '.join(suffixes)} file.")
    return files


def _shard(
    fs: fsspec.AbstractFileSystem, file: str, base: str, source: str | None, local: bool, suffixes: dict[str, Format]
) -> Shard:
    form = _format(file, suffixes)
    if form is None:
        if _COMPRESSED_TAR.search(file):
            raise DataError(_compressed(file))
        raise DataError(f"Input {file} is no {', '.join(suffixes)} file.")
    info = fs.info(file)
    version = next(
        (str(info[key]) for key in ("mtime", "ETag", "etag", "LastModified", "md5Hash", "updated") if key in info), ""
    )
    name = _stem(posixpath.relpath(file, base or "."), suffixes)
    folder = posixpath.basename(posixpath.dirname(file))
    own = re.sub(r"[-_.]*\d+$", "", posixpath.basename(name)) or folder or "data"
    url = file if local else fs.unstrip_protocol(file)
    return Shard(url, source or own, name, form, int(info["size"] or 0), version)


def _compressed(file: str) -> str:
    return f"{file} is a compressed tar: samples are addressed by their offset, so decompress it to a plain .tar first."


def _format(file: str, suffixes: dict[str, Format]) -> Format | None:
    return next((form for suffix, form in suffixes.items() if file.lower().endswith(suffix)), None)


def _stem(file: str, suffixes: dict[str, Format]) -> str:
    return next(
        (file[: -len(suffix)] for suffix in sorted(suffixes, key=len, reverse=True) if file.lower().endswith(suffix)),
        file,
    )


def _natural(file: str) -> list[tuple[int, int, str]]:
    """Sort key in which shard-9 comes before shard-10."""
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", file) if part]


def _braces(path: str) -> Iterator[str]:
    """`{00000..00127}` and `{a,b}`, as webdataset users write them."""
    parts = _BRACE.split(path)
    choices: list[list[str]] = []
    for position, part in enumerate(parts):
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if position % 2 == 0:
            choices.append([part])
        elif ends:
            choices.append([str(n).zfill(len(ends[1])) for n in range(int(ends[1]), int(ends[2]) + 1)])
        else:
            choices.append(part.split(","))
    yield from ("".join(choice) for choice in itertools.product(*choices))
