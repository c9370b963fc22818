"""What stages share that compare the one side of pairs (queries) with the other side of all pairs (documents).

Equal documents are one, that of the smallest id; equal means the same text without regard to case and white space, or
the same picture. All of them are searched, exactly (`pipelines.nearest`), or a pool of about so many, drawn by a keyed
coin. The rounds, over partitions (P) or fragments (F):

    collapse  P  by document: one of equal ones goes on
    draw      P  the pool
    gather    F  the embeddings of the fragment's documents, written once and read by all
    ...       F  what a stage does with its queries and all documents

A task holds its fragment's queries, one other fragment's documents at a time, and a tile of scores of 32 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import Field

from cl.corpus import VIEWS, Kind, normal_text
from pipelines.keyed import id_words, mix
from pipelines.nearest import DOCUMENTS, Documents, Skip
from pipelines.shuffle import Routed
from pipelines.stages.base import Rows, vectors, whole
from pipelines.stages.keyed import Inbox, KeyedStage, Round, Streams, fragment_of, place_of, references

WHO = [("side", pa.int8()), ("document", pa.uint64()), ("id0", pa.uint64()), ("id1", pa.uint64()), ("ref", pa.int64())]
ROWS = pa.schema(WHO)
COUNTS = pa.schema([("side", pa.int8()), ("count", pa.int64())])


class Neighbours(KeyedStage):
    """Base: a subclass adds its rounds to those that collect the documents."""

    seeded: ClassVar[bool] = True
    sends: ClassVar[tuple[str, ...]] = ("rows",)

    pool: int | None = Field(
        None, ge=1, description="documents to search, about, drawn by a keyed coin from the distinct ones; None: all"
    )

    def sides(self, kind: Kind) -> list[tuple[str, str]]:
        """(view of the queries, view of the documents) of each search."""
        first, second = VIEWS[kind]
        return [(first, second)]

    def needs(self, kind: Kind) -> list[str]:
        views = dict.fromkeys(view for side in self.sides(kind) for view in side)
        return [*(f"{view}_embedding" for view in views), *(holder(kind, view) for view in views)]

    def partial(self, rows: Rows, partitions: int) -> Streams:
        kind = rows.corpus.kind
        ids, refs = id_words(rows.table["id"].to_pylist()), references(rows)
        tables = []
        for side, (_, documents) in enumerate(self.sides(kind)):
            which = digests(rows.table[holder(kind, documents)])
            columns = [np.full(len(rows), side, np.int8), which, ids[:, 0], ids[:, 1], refs]
            tables.append(pa.table(columns, schema=ROWS))
        table = pa.concat_tables(tables)
        return {"rows": Routed(table, (table["document"].to_numpy() % np.uint64(partitions)).astype(np.int64))}

    def collecting(self) -> list[Round]:
        """The rounds after which `documents` are written."""
        return [
            Round("collapse", "partitions", ("rows",), ("distinct", "counts"), self._collapse),
            Round("draw", "partitions", ("distinct", "counts"), ("pool",), self._draw),
            Round("gather", "fragments", ("pool",), ("documents",), self._gather),
        ]

    def _collapse(self, inbox: Inbox) -> Streams:
        table = inbox.streams["rows"].sort_by([(name, "ascending") for name, _ in WHO])
        side, document = table["side"].to_numpy(), table["document"].to_numpy()
        first = np.ones(len(side), bool)
        first[1:] = (np.diff(side) != 0) | (np.diff(document) != 0)
        distinct = table.filter(pa.array(first))
        sides, counts = np.unique(side[first], return_counts=True)
        everybody = np.repeat(np.arange(inbox.partitions), len(sides))
        told = pa.table([np.tile(sides, inbox.partitions), np.tile(counts, inbox.partitions)], schema=COUNTS)
        return {
            "distinct": Routed(distinct, np.full(distinct.num_rows, inbox.task)),
            "counts": Routed(told, everybody),
        }

    def _draw(self, inbox: Inbox) -> Streams:
        table = inbox.streams["distinct"]
        if self.pool is not None:
            sides, counts = (column.to_numpy() for column in inbox.streams["counts"].columns)
            total = np.bincount(sides, counts, minlength=2)[table["side"].to_numpy()]
            key = np.uint64(xxhash.xxh3_64_intdigest(f"{inbox.seed}\0pool".encode()))
            coin = mix(table["document"].to_numpy() ^ key).astype(np.float64) / 2.0**64
            table = table.filter(pa.array(coin * total < self.pool))
        return {"pool": Routed(table, fragment_of(table["ref"].to_numpy()))}

    def _gather(self, inbox: Inbox) -> Streams:
        chosen = inbox.streams["pool"].sort_by([(name, "ascending") for name, _ in WHO])
        side = chosen["side"].to_numpy()
        parts = []
        for number, (_, documents) in enumerate(self.sides(inbox.kind)):
            mine = chosen.filter(pa.array(side == number))
            places = pa.array(place_of(mine["ref"].to_numpy()))
            vector = whole(inbox.columns.read(inbox.task, f"{documents}_embedding").take(places))
            parts.append(mine.append_column("vector", vector))
        table = pa.concat_tables(parts)
        return {"documents": Routed(table, np.full(table.num_rows, inbox.task))}

    def documents(self, inbox: Inbox, side: int) -> Iterator[tuple[np.ndarray, Documents]]:
        """The documents of a side in tiles: their digests, uint64 [m] ascending, and what is known of them."""
        for fragment in range(inbox.all_fragments):
            table = inbox.written("documents", fragment)
            table = table.filter(pa.array(table["side"].to_numpy() == side))
            for start in range(0, table.num_rows, DOCUMENTS):
                tile = table.slice(start, DOCUMENTS)
                ids = np.stack([tile["id0"].to_numpy(), tile["id1"].to_numpy()], 1)
                yield tile["document"].to_numpy(), Documents(vectors(tile["vector"]), ids, tile["ref"].to_numpy())


def holder(kind: Kind, view: str) -> str:
    """The column that tells what a view of a sample holds: a text, or the hash of a picture."""
    return "content" if VIEWS[kind][view] == "image" else view


def digests(column: pa.ChunkedArray) -> np.ndarray:
    """uint64 [n]: equal for equal texts, without regard to case and white space."""
    digest = xxhash.xxh3_64_intdigest
    return np.array([digest(normal_text(text or "").encode()) for text in column.to_pylist()], np.uint64)


def occurrences(wanted: np.ndarray, owner: np.ndarray, tile: np.ndarray) -> Skip:
    """Where digests stand in a tile: (owner, place) of each that is there.

    Args:
        wanted: uint64 [n] digests.
        owner: int64 [n], the query that each belongs to.
        tile: uint64 [m], ascending and distinct.
    """
    place = np.minimum(np.searchsorted(tile, wanted), len(tile) - 1)
    there = tile[place] == wanted
    return owner[there], place[there]
