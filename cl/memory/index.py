"""A hash table from 128-bit sample ids to row numbers: open addressing with linear probing, all ids of a call at once.

Rows are numbered in the order in which ids are first seen. The ids of one row and its share of the slots take 16 bytes
and 8 to 16 (int32 slots, at most half of them taken); doubling keeps the cost of an insertion constant on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl.engine.randomness import bits

_FREE = -1
_SMALLEST = 1024


def hash_of(ids: Tensor) -> Tensor:
    """64 well mixed bits [n] int64 of ids [n, 2], whatever the ids look like."""
    return bits(0, 0, ids[:, 0], ids[:, 1])


class IdIndex:
    """ids [n, 2] int64 -> rows [n] int64. Lives in main memory.

    Attributes:
        count: how many ids there are.
    """

    def __init__(self) -> None:
        self.count = 0
        self._ids = torch.empty(0, 2, dtype=torch.int64)  # [room, 2], by row
        self._slots = torch.full((_SMALLEST,), _FREE, dtype=torch.int32)

    @property
    def ids(self) -> Tensor:
        """[count, 2], by row."""
        return self._ids[: self.count]

    @property
    def bytes(self) -> int:
        return self._ids.nbytes + self._slots.nbytes

    def find(self, ids: Tensor) -> Tensor:
        """The row of each id [n], -1 for one that is not there."""
        rows = torch.full((len(ids),), -1, dtype=torch.int64)
        open_, slot = torch.arange(len(ids)), self._first_slot(ids)
        while len(open_):
            row = self._slots[slot].long()
            taken = row != _FREE
            right = taken & (self._ids[row.clamp_min(0)] == ids[open_]).all(1) if self.count else taken
            rows[open_[right]] = row[right]
            further = taken & ~right
            open_, slot = open_[further], self._next(slot[further])
        return rows

    def add(self, ids: Tensor) -> Tensor:
        """Rows [n] for ids [n, 2] that are distinct and not there yet."""
        rows = torch.arange(self.count, self.count + len(ids))
        self._ids = grown(self._ids, self.count + len(ids))
        self._ids[rows] = ids
        self.count += len(ids)
        if 2 * self.count > len(self._slots):
            slots = 2 ** (2 * self.count - 1).bit_length()
            self._slots = torch.full((slots,), _FREE, dtype=torch.int32 if slots < 2**31 else torch.int64)
            self._place(torch.arange(self.count))
        else:
            self._place(rows)
        return rows

    def _place(self, rows: Tensor) -> None:
        """Give each row the first free slot from its hash on; of rows that want the same one, one gets it."""
        slot = self._first_slot(self._ids[rows])
        while len(rows):
            free = self._slots[slot] == _FREE
            self._slots[slot[free]] = rows[free].to(self._slots.dtype)
            lost = self._slots[slot] != rows
            rows, slot = rows[lost], self._next(slot[lost])

    def _first_slot(self, ids: Tensor) -> Tensor:
        return hash_of(ids) & (len(self._slots) - 1)

    def _next(self, slot: Tensor) -> Tensor:
        return (slot + 1) & (len(self._slots) - 1)


def grown(values: Tensor, rows: int) -> Tensor:
    """`values` with room for `rows` rows: itself, or a copy that is half as large again."""
    if rows <= len(values):
        return values
    larger = values.new_empty(max(rows, len(values) * 3 // 2), *values.shape[1:])
    larger[: len(values)] = values
    return larger
