"""What duplicate stages share: candidates by equal keys, verified where the rows lie; of alike rows the first stays.

A subclass says what a row looks like (`describe`: a digest, keys, a small sketch) and compares two rows (`payload`,
`alike`). Two rows are a candidate if they share a key and their sketches allow it (`plausible`); only rows of
candidates ever leave their fragment. The rounds, over partitions (P) or fragments (F):

    collapse  P  by digest: of rows that no comparison tells apart only the first goes on, the others share its fate
    pair      P  by key: pairs of rows with a key in common, each from the earlier row (u) to the later (v)
    send      F  of u: what is needed to compare it goes to the fragment of v, once a fragment
    verify    F  of v: the pair is compared
    decide    P  a row is dropped if and only if it is alike to an earlier row that is kept (`first_kept`)

The order is (rank, id), rank being one rule: the id alone, the order of the corpus, size, sources or a column. Beside a
finished curation its kept rows come first, and stay whatever they are like.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from cl.corpus import Kind
from pipelines.keyed import id_text, id_words, mix
from pipelines.shuffle import Routed
from pipelines.stages.base import Columns, Output, Rows, internal, reasons, whole
from pipelines.stages.first_kept import COPIES, deciding, edges, home
from pipelines.stages.keyed import Inbox, KeyedStage, Round, Streams, fragment_of, place_of, references

WHO = [("ref", pa.int64()), ("rank", pa.float64()), ("id0", pa.uint64())]
ROWS = pa.schema([("digest0", pa.uint64()), ("digest1", pa.uint64()), *WHO, ("id1", pa.uint64()),
                  ("sketch", pa.uint64())])  # fmt: skip
ENTRIES = pa.schema([("key", pa.uint64()), *WHO, ("sketch", pa.uint64())])
PAIRS = pa.schema([("u", pa.int64()), ("v", pa.int64()), ("rank", pa.float64())])
ASKED = pa.schema([*PAIRS, ("id0", pa.uint64()), ("id1", pa.uint64())])


class Described(NamedTuple):
    """n rows as the rounds see them.

    Attributes:
        digest: uint64 [n, 2]; equal digests: rows that `alike` cannot tell apart.
        keys: uint64 [n, K].
        sketch: uint64 [n].
        taken: bool [n]; rows that are not are never duplicates.
    """

    digest: np.ndarray
    keys: np.ndarray
    sketch: np.ndarray
    taken: np.ndarray


class PairwiseDuplicates(KeyedStage):
    """Base of stages that drop rows alike to a row that stays."""

    drops: ClassVar[bool] = True
    frozen: ClassVar[Literal["rows"]] = "rows"
    sends: ClassVar[tuple[str, ...]] = ("rows",)
    same: ClassVar[float] = 1.0  # what `alike` says of a row and itself
    value: ClassVar[tuple[str, pa.DataType]]  # the column that says how alike a row is to the one that was kept

    keep: Literal["id", "first", "largest"] = Field(
        "id", description="which of alike rows stays: the smaller id, the first in the corpus, or the largest"
    )
    best: str | None = Field(None, description="numeric column whose highest value is kept, in place of `keep`")
    sources: tuple[str, ...] | None = Field(
        None, description="sources, the one to keep first, in place of `keep`; those not listed come last"
    )
    max_bucket: int = Field(
        200, ge=1, description="rows sharing a key of which all pairs are tried; further ones meet the first of these"
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.keep != "id") + (self.best is not None) + (self.sources is not None) > 1:
            raise ValueError("give one of keep, best and sources: ties go to the smaller id")
        return self

    @abstractmethod
    def describe(self, rows: Rows) -> Described:
        """Digests, keys and sketches of the rows of a fragment."""

    def plausible(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """bool [pairs]: whether rows of these sketches, uint64 [pairs], can be alike."""
        return np.ones(len(left), bool)

    @abstractmethod
    def payload(self, columns: Columns, fragment: int, rows: np.ndarray, kind: Kind) -> pa.Array:
        """What is needed to compare some rows of a fragment, one value a row."""

    @abstractmethod
    def alike(self, left: pa.Array, i: np.ndarray, right: pa.Array, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How alike the pairs (left[i], right[j]) are, float32 [pairs], and whether that is enough, bool [pairs]."""

    @abstractmethod
    def size(self, rows: Rows) -> np.ndarray:
        """float64 [n]: what `keep: largest` compares."""

    def rule_columns(self) -> list[str]:
        """Columns that the order needs; a subclass adds those of `size`."""
        return [self.best] if self.best else ["source"] if self.sources is not None else []

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [internal(f"{self.name}_of", pa.string()), internal(*self.value)]

    def _rank(self, rows: Rows, refs: np.ndarray) -> np.ndarray:
        """float64 [n], the lowest first: rows that stand before all others."""
        if rows.standing:
            return np.full(len(rows), -np.inf)
        if self.best:
            return -np.nan_to_num(rows.numbers(self.best), nan=-np.inf)
        if self.sources is not None:
            place = {source: float(index) for index, source in enumerate(self.sources)}
            return np.array([place.get(source, len(place)) for source in rows.table["source"].to_pylist()], np.float64)
        if self.keep == "largest":
            return -self.size(rows)
        return refs.astype(np.float64) if self.keep == "first" else np.zeros(len(rows))  # exact below 2^21 fragments

    def partial(self, rows: Rows, partitions: int) -> Streams:
        refs = references(rows)
        seen = self.describe(rows)
        ids = id_words(rows.table["id"].to_pylist())
        digest = seen.digest
        columns = [digest[:, 0], digest[:, 1], refs, self._rank(rows, refs), ids[:, 0], ids[:, 1], seen.sketch]
        table = pa.table(columns, schema=ROWS).append_column("keys", _lists(seen.keys))
        to = (digest[:, 0] % np.uint64(partitions)).astype(np.int64)
        return {"rows": Routed(table.filter(pa.array(seen.taken)), to[seen.taken])}

    def rounds(self) -> list[Round]:
        return [
            Round("collapse", "partitions", ("rows",), ("entries", "copies"), self._collapse),
            Round("pair", "partitions", ("entries",), ("pairs",), self._pair),
            Round("send", "fragments", ("pairs",), ("asked", "payloads"), self._send),
            Round("verify", "fragments", ("asked", "payloads"), ("in_edges", "out_edges"), self._verify),
            deciding(self.same),
        ]

    def _collapse(self, inbox: Inbox) -> Streams:
        table = inbox.streams["rows"]
        d0, d1, ref, rank, id0, id1, sketch = (table[name].to_numpy() for name in ROWS.names)
        order = np.lexsort((ref, id1, id0, rank, d1, d0))
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(d0[order]) != 0) | (np.diff(d1[order]) != 0)
        first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]  # of each row in sorted order
        one, other = first[~new], order[~new]
        copies = pa.table([ref[one], id0[one], id1[one], ref[other]], schema=COPIES)
        stay = order[new]
        keys = table["keys"].combine_chunks()
        width = keys.type.list_size
        key = keys.take(pa.array(stay)).flatten().to_numpy()
        columns = [np.repeat(values[stay], width) for values in (ref, rank, id0, sketch)]
        entries = pa.table([key, *columns], schema=ENTRIES)
        return {
            "entries": Routed(entries, (key % np.uint64(inbox.partitions)).astype(np.int64)),
            "copies": Routed(copies, home(ref[one], inbox.partitions)),
        }

    def _pair(self, inbox: Inbox) -> Streams:
        table = inbox.streams["entries"]
        key, ref, rank, id0, sketch = (column.to_numpy() for column in table.columns)
        shared = _repeated(key)  # few of all; only these need the longer sort
        key, ref, rank, id0, sketch = key[shared], ref[shared], rank[shared], id0[shared], sketch[shared]
        order = np.lexsort((ref, id0, rank, key))
        key, ref, rank, sketch = key[order], ref[order], rank[order], sketch[order]
        place = np.arange(len(key))
        new = np.diff(key, prepend=key[:1] + np.uint64(1)) != 0
        standing = inbox.standing(ref)
        within = place - np.maximum.accumulate(np.where(new, place, 0))
        found = [np.zeros((0, 2), np.int64)]
        # Compare each row with the next, the next but one ... as long as any bucket is that long.
        same = np.flatnonzero(within < self.max_bucket)
        for step in range(1, len(key)):
            same = same[same + step < len(key)]
            same = same[key[same] == key[same + step]]
            if not len(same):
                break
            near = same[self.plausible(sketch[same], sketch[same + step]) & ~standing[same + step]]
            found.append(np.stack([near, near + step], 1))
        first, second = np.concatenate(found).T
        pairs, at = _unique_pairs(ref[first], ref[second])
        out = pa.table([*pairs, rank[first[at]]], schema=PAIRS)
        return {"pairs": Routed(out, fragment_of(pairs[0]))}

    def _send(self, inbox: Inbox) -> Streams:
        u, v, rank = (column.to_numpy() for column in inbox.streams["pairs"].columns)
        (u, v), at = _unique_pairs(u, v)
        rank = rank[at]
        rows, of = np.unique(u, return_inverse=True)
        ids = id_words(inbox.columns.read(inbox.task, "id").take(pa.array(place_of(rows))).to_pylist())[of]
        asked = pa.table([u, v, rank, ids[:, 0], ids[:, 1]], schema=ASKED)
        (sent, to), at = _unique_pairs(u, fragment_of(v))
        payload = self.payload(inbox.columns, inbox.task, place_of(rows), inbox.kind).take(pa.array(of[at]))
        return {
            "asked": Routed(asked, fragment_of(v)),
            "payloads": Routed(pa.table({"u": sent, "payload": payload}), to),
        }

    def _verify(self, inbox: Inbox) -> Streams:
        u, v, rank, id0, id1 = (column.to_numpy() for column in inbox.streams["asked"].columns)
        payloads = inbox.streams["payloads"].sort_by("u")
        i = np.searchsorted(payloads["u"].to_numpy(), u)
        rows, j = np.unique(v, return_inverse=True)
        mine = self.payload(inbox.columns, inbox.task, place_of(rows), inbox.kind)
        value, near = self.alike(whole(payloads["payload"]), i, mine, j)
        ids = np.stack([id0, id1], 1)[near]
        return edges(u[near], v[near], value[near], rank[near], ids, inbox.partitions)

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        positions = reduced["row"].to_numpy()
        kept, value = np.full(len(rows), None, object), np.full(len(rows), None, object)
        kept[positions] = id_text(np.stack([reduced["id0"].to_numpy(), reduced["id1"].to_numpy()], 1))
        value[positions] = reduced["value"].to_pylist()
        dropped = np.zeros(len(rows), bool)
        dropped[positions] = True
        name, kind = self.value
        columns: dict[str, Any] = {f"{self.name}_of": kept, name: pa.array(value, pa.float32()).cast(kind)}
        return Output(columns, reasons(len(rows), {self.name: dropped}))


def _repeated(keys: np.ndarray) -> np.ndarray:
    """Where the values lie that are there more than once."""
    order = np.argsort(keys)
    same = np.diff(keys[order]) == 0
    shared = np.zeros(len(keys), bool)
    shared[:-1] |= same
    shared[1:] |= same
    return order[shared]


def _unique_pairs(u: np.ndarray, v: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Distinct pairs in an order of their own, and where one of each stands."""
    order = np.argsort(mix(mix(u.astype(np.uint64)) + v.astype(np.uint64)))  # one short key sorts faster than two
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(u[order]) != 0) | (np.diff(v[order]) != 0)
    at = order[first]
    return (u[at], v[at]), at


def _lists(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.uint64()), values.shape[1])
