"""Where each kept sample goes: its lane, its chunk and shard, and its position in the whole curated corpus.

A sample's lane is a keyed hash of its content modulo the number of lanes, so equal content shares a lane and never
meets itself as a negative (`cl/batches/plan.py`). Within a lane the order is a keyed hash of the id. A lane is cut into
the least number of chunks of about equal bytes; chunks go to shards in order, again of about equal bytes. Sizes are
exceeded by one sample, or one chunk, at most.

The rounds, over partitions (P), which hold whole lanes, or fragments (F):

    measure  P  the samples and bytes of each lane, which everybody must know
    place    P  sort a lane and cut it; the numbers of shards that it starts in go to everybody
    number   F  shards in which no chunk starts leave no gap
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.config import Config
from cl.corpus import Kind, text_pair_content
from cl.errors import DataError
from pipelines.keyed import id_text, id_words, keyed_hash
from pipelines.shuffle import Routed, to_everyone
from pipelines.stages.base import Output, Rows, text_fields
from pipelines.stages.keyed import Inbox, KeyedStage, Round, Streams, fragment_of, references

MIB = 1 << 20
OVERHEAD = 2048  # bytes of headers, padding and JSON that a sample adds to a shard, about


class WriteConfig(Config):
    """How the curated corpus is laid out."""

    lanes: int = Field(64, ge=1, le=65536, description="lanes; at least the largest number of workers that will train")
    chunk_mib: float = Field(8.0, gt=0, description="MiB of one chunk (row group), the unit of reading; 8 to 16 suit")
    shard_mib: float = Field(128.0, gt=0, description="MiB of one shard, about")
    view: bool = Field(
        False, description="copy no bytes: rows in their order point to the shards of the input, whose lanes they keep"
    )
    columns: tuple[str, ...] | None = Field(
        None,
        description="columns of stages to carry into the corpus, lists of numbers or texts too; None: all that hold "
        "plain numbers and text",
    )
    replace: dict[str, str] = Field(
        default_factory=dict,
        description="text of the corpus -> column that takes its place: {text: text_clean}, {negatives: mined_texts}",
    )


PLACED = pa.schema([("out_shard", pa.int32()), ("chunk", pa.int32()), ("place", pa.int64()), ("out_lane", pa.int32())])
ROWS = pa.schema(
    [("ref", pa.int64()), ("lane", pa.int32()), ("order", pa.uint64()), ("id0", pa.uint64()), ("id1", pa.uint64()),
     ("bytes", pa.int64())]
)  # fmt: skip
LANES = pa.schema([("lane", pa.int32()), ("rows", pa.int64()), ("bytes", pa.int64())])


class Placement(KeyedStage):
    """Writes `PLACED`. A task holds some 100 bytes a sample of its lanes."""

    name: ClassVar[str] = "write"
    frozen: ClassVar[Literal["anew"]] = "anew"
    seeded: ClassVar[bool] = True
    version: ClassVar[int] = 2
    sends: ClassVar[tuple[str, ...]] = ("rows",)

    settings: WriteConfig

    def needs(self, kind: Kind) -> list[str]:
        texts = [self.settings.replace.get(name, name) for name in text_fields(kind)]
        lists = [self.settings.replace[name] for name in self.settings.replace if name not in text_fields(kind)]
        return ["content", "meta", *(["length"] if kind == "image-text" else []), *texts, *lists]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return list(PLACED)

    def partial(self, rows: Rows, partitions: int) -> Streams:
        ids = rows.table["id"].to_pylist()
        content = contents(rows.table, rows.corpus.kind, self.settings)
        lanes = (keyed_hash(rows.seed, content, "lane") % np.uint64(self.settings.lanes)).astype(np.int32)
        words = id_words(ids)
        columns = [references(rows), lanes, keyed_hash(rows.seed, ids, "order"), words[:, 0], words[:, 1]]
        table = pa.table([*columns, self._sizes(rows)], schema=ROWS)
        return {"rows": Routed(table, lanes % partitions)}

    def _sizes(self, rows: Rows) -> np.ndarray:
        """int64 [n]: bytes that the samples will take, about."""
        size = np.full(len(rows), OVERHEAD, np.int64)
        for column in self.needs(rows.corpus.kind)[1:]:
            if column == "length":
                size += rows.table[column].to_numpy()
            elif pa.types.is_list(rows.table.schema.field(column).type):
                texts = rows.table[column].to_pylist()
                size += np.array([sum(len(text.encode()) for text in each or ()) for each in texts], np.int64)
            else:
                size += np.array([len(text.encode()) for text in rows.texts(column)], np.int64)
        return size

    def rounds(self) -> list[Round]:
        return [
            Round("measure", "partitions", ("rows",), ("lanes",), self._measure),
            Round("place", "partitions", ("rows", "lanes"), ("placed", "shards"), self._place),
            Round("number", "fragments", ("placed", "shards"), ("verdicts",), self._number),
        ]

    def _measure(self, inbox: Inbox) -> Streams:
        lane, size = (inbox.streams["rows"][name].to_numpy() for name in ("lane", "bytes"))
        lanes, which = np.unique(lane, return_inverse=True)
        total = np.zeros(len(lanes), np.int64)
        np.add.at(total, which, size)  # exact, as weights of `bincount` are not
        return {"lanes": to_everyone(pa.table([lanes, np.bincount(which), total], schema=LANES))}

    def _place(self, inbox: Inbox) -> Streams:
        ref, lane, key, id0, id1, size = (column.to_numpy() for column in inbox.streams["rows"].columns)
        order = np.lexsort((id1, id0, key, lane))
        ref, lane, id0, id1, size = ref[order], lane[order], id0[order], id1[order], size[order]
        twice = np.flatnonzero((lane[1:] == lane[:-1]) & (id0[1:] == id0[:-1]) & (id1[1:] == id1[:-1]))
        if len(twice):
            known = id_text(np.array([[id0[twice[0]], id1[twice[0]]]]))[0]
            raise DataError(f"The corpus holds id {known} twice: ingest each shard once, or give sources other names.")
        lanes, rows, total = (column.to_numpy() for column in inbox.streams["lanes"].sort_by("lane").columns)
        place, chunk = np.zeros(len(ref), np.int64), np.zeros(len(ref), np.int64)
        shard = np.zeros(len(ref), np.int64)
        for number in np.unique(lane):
            mine, earlier = slice(*np.searchsorted(lane, [number, number + 1])), lanes < number
            chunk[mine], start = cut(size[mine], self.settings.chunk_mib * MIB)
            shard[mine] = shard_of(total[earlier].sum() + start, int(total.sum()), self.settings.shard_mib * MIB)
            place[mine] = rows[earlier].sum() + np.arange(len(start))
        used = pa.table({"shard": np.unique(shard)})
        found = zip((shard, chunk, place, lane), PLACED, strict=True)
        columns = [pa.array(ref), *(pa.array(values, field.type) for values, field in found)]
        placed = pa.table(columns, names=["ref", *PLACED.names])
        return {"placed": Routed(placed, fragment_of(ref)), "shards": to_everyone(used)}

    def _number(self, inbox: Inbox) -> Streams:
        placed = inbox.streams["placed"].sort_by("ref")
        used = np.unique(inbox.streams["shards"]["shard"].to_numpy())
        shard = np.searchsorted(used, placed["out_shard"].to_numpy()).astype(np.int32)
        table = placed.select(PLACED.names).set_column(0, PLACED.field(0), pa.array(shard))
        return {"verdicts": Routed(table, np.full(len(table), inbox.task))}

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        return Output({name: reduced[name] for name in PLACED.names})


def contents(table: pa.Table, kind: Kind, settings: WriteConfig) -> list[str]:
    """The content hashes that samples will have: those of text pairs are other ones if a text is replaced."""
    if kind == "image-text" or not settings.replace:
        return list(table["content"].to_pylist())
    sides = (table[settings.replace.get(name, name)].to_pylist() for name in text_fields(kind))
    return [text_pair_content(anchor, positive) for anchor, positive in zip(*sides, strict=True)]


def cut(size: np.ndarray, chunk_bytes: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the samples of a lane in their order: the number of each one's chunk within the lane, and the byte of the lane
    at which that chunk starts.
    """
    before = np.cumsum(size) - size
    total = int(size.sum())
    chunks = np.ceil(total / chunk_bytes)
    within = np.floor(before * chunks / total)
    new = np.diff(within, prepend=-1) != 0
    chunk = np.cumsum(new) - 1
    return chunk, before[new][chunk]


def shard_of(start: np.ndarray, total: int, shard_bytes: float) -> np.ndarray:
    """The shard of chunks that start at these bytes of the corpus; where chunks are large some shards get none."""
    return np.floor(start * np.ceil(total / shard_bytes) / total).astype(np.int64)
