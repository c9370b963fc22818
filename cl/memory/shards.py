"""Per-sample tables on disk: one file a worker and table, read by any number of workers.

    FOLDER/TABLE/00002-of-00004.safetensors      ids [n, 2] and each field [n] of worker 2 of 4

Workers write side by side, each what it holds. A worker owns a range of the ids' hashes (`cl.memory.table`), so another
number of workers reads those files alone whose ranges touch its own, and keeps its part of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import nn

from cl import storage
from cl.engine.collectives import Workers
from cl.errors import DataError
from cl.memory.table import SampleTable

_FILE = re.compile(r"(?P<table>.+)/(?P<rank>\d{5})-of-(?P<size>\d{5})\.safetensors")


def tables_of(module: nn.Module) -> dict[str, SampleTable]:
    """The tables of a module by their path in it."""
    return {name: part for name, part in module.named_modules() if isinstance(part, SampleTable)}


def save_tables(module: nn.Module, folder: str, workers: Workers) -> list[str]:
    """Write this worker's shards below `folder` (a path or URL that all workers share).

    Returns:
        The names of this worker's files in `folder`.

    Raises:
        DataError: they cannot be written.
    """
    names = []
    for table_name, table in tables_of(module).items():
        names.append(f"{table_name}/{workers.rank:05d}-of-{workers.size:05d}.safetensors")
        columns = {field: table.values[:, place].contiguous() for place, field in enumerate(table.fields)}
        storage.write_bytes(storage.join(folder, names[-1]), save({"ids": table.index.ids, **columns}))
    return names


def load_tables(module: nn.Module, names: Iterable[str], read: Callable[[str], bytes], workers: Workers) -> None:
    """Fill this worker's shards with what it owns of the files `names`, written by any number of workers.

    Args:
        module: its tables are emptied first.
        names: of all workers' files, as `save_tables` gave them.
        read: the bytes of a file, by its name.
        workers: those that hold the tables from now on.

    Raises:
        DataError: files are missing, or hold other fields.
    """
    found: dict[str, dict[int, str]] = {}
    sizes: dict[str, int] = {}
    for name in names:
        match = _FILE.fullmatch(name)
        if match is None:
            raise DataError(f"{name} is not a file of a per-sample table.")
        found.setdefault(match["table"], {})[int(match["rank"])] = name
        sizes[match["table"]] = int(match["size"])
    for table_name, table in tables_of(module).items():
        files, size = found.get(table_name, {}), sizes.get(table_name, 0)
        if not size or files.keys() != set(range(size)):
            raise DataError(f"Of the per-sample table {table_name!r} there are {len(files)} files of {size or 'none'}.")
        table.clear()
        for rank, name in sorted(files.items()):
            # [rank / size, (rank + 1) / size) against this worker's range, in whole numbers
            if rank * workers.size < (workers.rank + 1) * size and (rank + 1) * workers.size > workers.rank * size:
                _take(table, name, read(name), workers)


def _take(table: SampleTable, name: str, data: bytes, workers: Workers) -> None:
    columns = load(data)
    if columns.keys() != {"ids", *table.fields}:
        raise DataError(f"{name} holds {', '.join(sorted(columns))}; expected ids, {', '.join(sorted(table.fields))}.")
    mine = table.owned(columns["ids"], workers)
    table.put(columns["ids"][mine], torch.stack([columns[field] for field in table.fields], 1)[mine])


def everyones(names: list[str], workers: Workers) -> list[str]:
    """The names of all workers, on each."""
    if workers.size == 1:
        return names
    gathered: list[list[str]] = [[] for _ in range(workers.size)]
    dist.all_gather_object(gathered, names, group=workers.group)
    return [name for each in gathered for name in each]
