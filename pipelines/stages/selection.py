"""Exactly so many rows of each group, the first by (key, id), out of a corpus that no task could sort.

The last row that stays is found digit by digit (a radix selection). The keys lie spread over partitions; for each digit
of 16 bits a round counts, for every group, how many of its rows have which value, and a round looks up in which value
the last row falls; only the rows that share all digits with it are sent on. Groups are a cluster each, or one group is
everything. What a task holds is its share of the keys, 32 bytes a row, and a few numbers a group:

    count  P  rows of each group by the next digit, among those that are still open    } for each digit
    cut    P  of the group: the digit in which its last row falls                      }
    send   P  the rows that no digit told apart go to the partition of their group ...
    settle P  ... which sorts them; every fragment gets the last row of every group
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines.keyed import id_words, mix
from pipelines.shuffle import Routed, to_everyone
from pipelines.stages.base import Rows
from pipelines.stages.keyed import Inbox, KeyedStage, Round, Streams

KEYS = pa.schema([("group", pa.int64()), ("key", pa.uint64()), ("id0", pa.uint64()), ("id1", pa.uint64())])
# Of each group the last row that stays, as far as it is known, and how many of the rows that begin like it stay: 0 once
# it is known.
CUTS = pa.schema([*KEYS, ("open", pa.int64())])
COUNTS = pa.schema([("group", pa.int64()), ("digit", pa.int64()), ("count", pa.int64())])
NEW_GROUPS = b"clew.new_groups"  # in the metadata of cuts
DIGIT = 16
ALL = np.uint64(2**64 - 1)
# The digits that are counted, (word, bits to its right): as many as tell apart all but a few rows of a group.
Digits = Sequence[tuple[str, int]]
HASHED: Digits = (("key", 48),)  # a uniform hash
FLOAT32: Digits = (("key", 48), ("key", 32), ("id0", 48))  # equal values can be many; ids are uniform
FLOAT64: Digits = (("key", 48), ("key", 32), ("key", 16), ("key", 0), ("id0", 48))


class Keys(NamedTuple):
    """n rows as a selection sees them: group int64 [n], key uint64 [n] (the lowest first) and id uint64 [n, 2]."""

    group: np.ndarray
    key: np.ndarray
    ids: np.ndarray


@dataclass
class Groups:
    """The groups, ascending.

    Attributes:
        group: int64 [g].
        size: int64 [g], its rows.
        above: name -> int64 [g], what else is known of a group.
    """

    group: np.ndarray
    size: np.ndarray
    above: dict[str, np.ndarray] = field(default_factory=dict)


def ascending(values: np.ndarray) -> np.ndarray:
    """uint64 [n] in the order of float32 or float64 [n], NaN last; float32 fill the upper 32 bits alone."""
    bits = 8 * values.dtype.itemsize
    plain = np.where(np.isnan(values), np.inf, values + 0.0).astype(values.dtype)  # + 0.0: one zero
    words = plain.view(np.dtype(f"u{bits // 8}")).astype(np.uint64)
    sign = np.uint64(1 << (bits - 1))
    flipped = np.where(words & sign, words ^ np.uint64((1 << bits) - 1), words | sign)
    return np.asarray(flipped << np.uint64(64 - bits), np.uint64)


class Selection(KeyedStage):
    """Base of stages that keep so many rows of each group."""

    frozen: ClassVar[Literal["statistics"]] = "statistics"
    sends: ClassVar[tuple[str, ...]] = ("keys",)
    result: ClassVar[str] = "cuts"

    def freeze(self, reduced: pa.Table) -> pa.Table:
        """The last row of each group stays where it is; of a group that had no rows all new ones stay."""
        return reduced.replace_schema_metadata({NEW_GROUPS: b"stay"})

    def above(self) -> tuple[str, ...]:
        """Columns of `keys` beside KEYS: numbers that are the same in a whole group."""
        return ()

    def digits(self) -> Digits:
        """The digits that are counted."""
        return FLOAT32

    @abstractmethod
    def quotas(self, groups: Groups) -> np.ndarray:
        """int64 [g]: how many rows of each group stay."""

    def send_keys(
        self, keys: Keys, partitions: int, taking_part: np.ndarray | None = None, above: Sequence[np.ndarray] = ()
    ) -> Streams:
        """What `partial` sends: the keys of rows that take part (bool [n]; None: all), with the columns `above`."""
        columns = [keys.group, keys.key, keys.ids[:, 0], keys.ids[:, 1], *above]
        table = pa.table([pa.array(values) for values in columns], names=[*KEYS.names, *self.above()])
        to = (keys.ids[:, 0] % np.uint64(partitions)).astype(np.int64)
        if taking_part is not None:
            table, to = table.filter(pa.array(taking_part)), to[taking_part]
        return {"keys": Routed(table, to)}

    def rounds(self) -> list[Round]:
        out: list[Round] = []
        known: str | None = None  # the stream with the cuts so far
        for level in range(len(self.digits())):
            counts, cuts = f"counts-{level}", f"cuts-{level}"
            before = (known,) if known else ()
            count, cut = partial(self._count, level, known), partial(self._cut, level, known)
            sizes = () if known else ("sizes",)
            out.append(Round(f"count {level}", "partitions", ("keys", *before), (counts, *sizes), count))
            if not known:
                out.append(Round("total", "partitions", sizes, ("totals",), self._total))
            out.append(Round(f"cut {level}", "partitions", (counts, *(before or ("totals",))), (cuts,), cut))
            known = cuts
        assert known is not None
        out.append(Round("send", "partitions", ("keys", known), ("ties",), partial(self._send, known)))
        settle = partial(self._settle, known)
        out.append(Round("settle", "partitions", ("ties", known), (self.result,), settle))
        return out

    def _open(self, inbox: Inbox, level: int, cuts: str | None) -> pa.Table:
        """The keys that have the first digits of the last row of their group, where it is not yet known."""
        keys = inbox.streams["keys"]
        if cuts is None:
            return keys
        cut = inbox.streams[cuts].sort_by("group")
        place = place_of_group(cut, keys["group"].to_numpy())
        open_ = (place >= 0) & (cut["open"].to_numpy()[place] > 0) if cut.num_rows else np.zeros(len(place), bool)
        for word in ("key", "id0"):
            mask = self._mask(level, word)
            if mask:
                open_[open_] = (keys[word].to_numpy()[open_] & mask) == cut[word].to_numpy()[place[open_]]
        return keys.filter(pa.array(open_))

    def _mask(self, level: int, word: str) -> np.uint64:
        """The bits of a word that the digits before a level cover."""
        return np.uint64(sum(0xFFFF << shift for each, shift in self.digits()[:level] if each == word))

    def _count(self, level: int, cuts: str | None, inbox: Inbox) -> Streams:
        keys = self._open(inbox, level, cuts)
        word, shift = self.digits()[level]
        group, place = np.unique(keys["group"].to_numpy(), return_inverse=True)
        digit = ((keys[word].to_numpy() >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
        both, count = np.unique(place * (1 << DIGIT) + digit, return_counts=True)
        of = group[both >> DIGIT]
        table = pa.table([of, both & 0xFFFF, count], schema=COUNTS)
        out = {f"counts-{level}": Routed(table, owner(of, inbox.partitions))}
        if not level:
            _, first, size = np.unique(place, return_index=True, return_counts=True)
            above = {name: keys[name].to_numpy()[first] for name in self.above()}
            sizes = pa.table({"group": group, "size": size, **above})
            out["sizes"] = Routed(sizes, owner(group, inbox.partitions))
        return out

    def _total(self, inbox: Inbox) -> Streams:
        table = inbox.streams["sizes"]
        group, first, place = np.unique(table["group"].to_numpy(), return_index=True, return_inverse=True)
        size = np.zeros(len(group), np.int64)
        np.add.at(size, place, table["size"].to_numpy())
        above = {name: table[name].to_numpy()[first] for name in self.above()}
        return {"totals": to_everyone(pa.table({"group": group, "size": size, **above}))}

    def _cut(self, level: int, cuts: str | None, inbox: Inbox) -> Streams:
        """Where the last row of each of this partition's groups falls, one digit further."""
        before = self._first_cuts(inbox) if cuts is None else inbox.streams[cuts].sort_by("group")
        before = before.filter(pa.array(owner(before["group"].to_numpy(), inbox.partitions) == inbox.task))
        key, id0, id1, left = (before[name].to_numpy().copy() for name in ("key", "id0", "id1", "open"))
        table = inbox.streams[f"counts-{level}"]
        both, place = np.unique(
            np.stack([table["group"].to_numpy(), table["digit"].to_numpy()]), axis=1, return_inverse=True
        )
        count = np.zeros(both.shape[1], np.int64)
        np.add.at(count, place.ravel(), table["count"].to_numpy())
        of = place_of_group(before, both[0])
        count, digit, of = count[of >= 0], both[1][of >= 0].astype(np.uint64), of[of >= 0]
        running = np.cumsum(count)
        base = (running - count)[np.searchsorted(of, of)]  # rows of the groups before
        smaller = running - count - base
        hit = np.flatnonzero((smaller < left[of]) & (smaller + count >= left[of]))
        at = of[hit]
        word, shift = self.digits()[level]
        (key if word == "key" else id0)[at] |= digit[hit] << np.uint64(shift)
        left[at] -= smaller[hit]
        known = at[left[at] == count[hit]]  # all rows that begin like this stay
        if word == "key":  # else it is whole
            key[known] |= ~self._mask(level + 1, "key")
        id0[known] |= ~self._mask(level + 1, "id0")
        id1[known], left[known] = ALL, 0
        out = pa.table([before["group"], key, id0, id1, left], schema=CUTS)
        return {f"cuts-{level}": to_everyone(out)}

    def _first_cuts(self, inbox: Inbox) -> pa.Table:
        """Groups of which some rows stay, nothing known of the last one unless all stay."""
        totals = inbox.streams["totals"].sort_by("group")
        size = totals["size"].to_numpy()
        above = {name: totals[name].to_numpy() for name in self.above()}
        quota = np.minimum(self.quotas(Groups(totals["group"].to_numpy(), size, above)), size)
        word = np.where(quota == size, ALL, np.uint64(0))
        cuts = pa.table([totals["group"], word, word, word, np.where(quota == size, 0, quota)], schema=CUTS)
        return cuts.filter(pa.array(quota > 0))

    def _send(self, cuts: str, inbox: Inbox) -> Streams:
        ties = self._open(inbox, len(self.digits()), cuts).select(KEYS.names)
        return {"ties": Routed(ties, owner(ties["group"].to_numpy(), inbox.partitions))}

    def _settle(self, cuts: str, inbox: Inbox) -> Streams:
        mine = inbox.streams[cuts].sort_by("group")
        mine = mine.filter(pa.array(owner(mine["group"].to_numpy(), inbox.partitions) == inbox.task))
        group, key, id0, id1, left = (mine[name].to_numpy().copy() for name in CUTS.names)
        tied = [inbox.streams["ties"][name].to_numpy() for name in KEYS.names]
        order = np.lexsort((tied[3], tied[2], tied[1], tied[0]))
        open_ = np.flatnonzero(left)
        last = order[np.searchsorted(tied[0][order], group[open_]) + left[open_] - 1]
        key[open_], id0[open_], id1[open_] = (tied[word][last] for word in (1, 2, 3))
        out = pa.table([group, key, id0, id1, np.zeros_like(left)], schema=CUTS)
        return {self.result: to_everyone(out)}


def selected(keys: Keys, reduced: pa.Table) -> np.ndarray:
    """bool [n]: whether rows stay, from what a selection's rounds sent."""
    cuts = reduced.sort_by("group")
    place = place_of_group(cuts, keys.group)
    new = (place < 0) & (NEW_GROUPS in (reduced.schema.metadata or {}))
    if not cuts.num_rows:
        return new
    key, id0, id1 = (cuts[name].to_numpy()[place] for name in ("key", "id0", "id1"))
    first, second = keys.ids.T
    tie = (first < id0) | ((first == id0) & (second <= id1))
    return np.asarray(new | (place >= 0) & ((keys.key < key) | ((keys.key == key) & tie)))


def place_of_group(table: pa.Table, group: np.ndarray) -> np.ndarray:
    """int64 [n]: where each group stands in the ascending column `group`, -1 if it does not."""
    known = table["group"].to_numpy()
    place = np.searchsorted(known, group)
    there = place < len(known)
    there[there] = known[place[there]] == group[there]
    return np.where(there, place, -1)


def owner(group: np.ndarray, partitions: int) -> np.ndarray:
    """int64 [n]: the partition that cuts each group."""
    return (mix(group.astype(np.uint64)) % np.uint64(partitions)).astype(np.int64)


def no_keys() -> Keys:
    return Keys(np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros((0, 2), np.uint64))


def keys_of(rows: Rows, group: np.ndarray, key: np.ndarray) -> Keys:
    """The keys of the rows of a fragment."""
    return Keys(group, key, id_words(rows.table["id"].to_pylist()))
