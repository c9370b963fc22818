"""Samples that were taken down: their ids stay with the corpus, so that no later run brings them back.

CORPUS/tombstones.parquet   one column, id: everything that `clew remove` ever took out, in ascending order
CORPUS/removing.json        a removal is under way, or was killed: until it is done nobody reads the corpus
"""

from __future__ import annotations

import pyarrow as pa
from blake3 import blake3

from cl import storage
from cl.errors import DataError

TOMBSTONES = "tombstones.parquet"
PENDING = "removing.json"


def read_tombstones(root: str) -> list[str]:
    """The ids of the samples that were removed from a corpus, ascending; [] if none ever was."""
    path = storage.join(root, TOMBSTONES)
    return list(storage.read_table(path, ["id"])["id"].to_pylist()) if storage.exists(path) else []


def write_tombstones(root: str, ids: list[str]) -> None:
    storage.write_table(storage.join(root, TOMBSTONES), pa.table({"id": pa.array(ids, pa.string())}))


def tombstones_digest(root: str) -> str:
    """16 hex digits that change with the ids; "" if nothing was removed."""
    ids = read_tombstones(root)
    return blake3("".join(ids).encode()).hexdigest(length=8) if ids else ""


def refuse_unfinished_removal(root: str) -> None:
    """Refuse a corpus that may still hold samples that are to be gone.

    Raises:
        DataError: a removal was not finished.
    """
    if storage.exists(storage.join(root, PENDING)):
        raise DataError(f"A removal from {root} is not finished: run the same `clew remove` again first.")
