"""Numbers that each training sample keeps from one visit to the next: estimates, temperatures, loss histories.

Every worker keeps the samples of its range of the ids' hashes, in main memory; nobody keeps them all. A step is a
*visit*: the ids of the global batch are gathered, owners look up, the values go to whoever holds the sample, and the
new ones go back: 2 + 2 F numbers a sample of the batch for F fields, whatever the size of the table.

An id may occur several times in a global batch (a repeated sample, a mixture of sources). All its rows then read the
same values, and `Visit.mean` gives each of them the mean over all of them, so that whatever is computed from it is the
same on all rows; `Visit.write` stores it once. The result depends neither on the number of workers nor on who holds
which row.

Memory a sample: 16 bytes of id, 8 to 16 of index and 4 F of values in float32, times 1 to 1.5 while arrays grow.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cl.engine.collectives import Layout, Workers
from cl.errors import DataError
from cl.memory.index import IdIndex, grown, hash_of


def place_of(ids: Tensor) -> Tensor:
    """[n] in [0, 1): where ids lie by their hash; worker r of W owns those in [r / W, (r + 1) / W)."""
    return ((hash_of(ids) >> 33) & (2**31 - 1)).double() / 2**31


class SampleTable(nn.Module):
    """This worker's shard of the table.

    Not in `state_dict`, which one worker writes for all: `cl.memory.shards` saves and loads it.

    Args:
        fields: name -> the value of a sample that was never written.

    Attributes:
        index: the ids of this shard.
    """

    def __init__(self, fields: Mapping[str, float]) -> None:
        super().__init__()
        self.fields = dict(fields)
        self.index = IdIndex()
        self._values = torch.empty(0, len(self.fields))  # [room, F]

    @property
    def values(self) -> Tensor:
        """[count, F] of this worker's samples, in the order of `index.ids` and `fields`."""
        return self._values[: self.index.count]

    @property
    def bytes(self) -> int:
        """Main memory that this shard takes."""
        return self.index.bytes + self._values.nbytes

    def visit(self, ids: Tensor | None, weight: Tensor, workers: Workers) -> Visit:
        """Look up the samples of a global batch; every worker calls this.

        Args:
            ids: [B, 2] of this worker.
            weight: [B], 0 for samples that take no part; its dtype is that of the values (float32 or float64).
            workers: who takes part.

        Raises:
            DataError: the batch has no ids.
        """
        if ids is None:
            raise DataError("The objective keeps numbers for each sample, but the batch has no sample ids.")
        layout = workers.layout(len(weight), weight.device)
        everyone = layout.gather(ids).cpu()
        counts = layout.gather(weight).cpu() > 0
        mine = self.owned(everyone, workers)
        values = torch.zeros(len(everyone), len(self.fields), dtype=weight.dtype)
        values[mine] = self._read(everyone[mine], weight.dtype)
        local = layout.reduce_scatter(values.to(weight.device))
        return Visit(self, layout, everyone, counts, mine, dict(zip(self.fields, local.T, strict=True)))

    def put(self, ids: Tensor, values: Tensor) -> None:
        """Store values [n, F] of distinct ids [n, 2] in this shard."""
        rows = self.index.find(ids)
        new = rows < 0
        rows[new] = self.index.add(ids[new])
        self._values = grown(self._values.to(torch.promote_types(self._values.dtype, values.dtype)), self.index.count)
        self._values[rows] = values.to(self._values.dtype)

    def clear(self) -> None:
        """Forget everything."""
        self.index, self._values = IdIndex(), self._values[:0].clone()

    def _read(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.index.find(ids)
        values = torch.tensor(list(self.fields.values()), dtype=dtype).repeat(len(ids), 1)
        known = rows >= 0
        values[known] = self._values[rows[known]].to(dtype)
        return values

    @staticmethod
    def owned(ids: Tensor, workers: Workers) -> Tensor:
        """[n] bool: which of the ids this worker keeps."""
        return (place_of(ids) * workers.size).long() == workers.rank


class Visit:
    """One step's use of a table.

    Attributes:
        values: field -> [B], as it was before this step.
        workers: who takes part.
    """

    def __init__(
        self,
        table: SampleTable,
        layout: Layout,
        ids: Tensor,
        counts: Tensor,
        mine: Tensor,
        values: Mapping[str, Tensor],
    ) -> None:
        self.values = values
        self.workers = layout.workers
        self._table, self._layout, self._ids, self._counts, self._mine = table, layout, ids, counts, mine
        self._group, self._groups = _grouped(ids)

    def mean(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B]: the mean of `values` over all rows of the global batch with the same id that count and are `valid`.

        0 on rows that are not. Rows are added up in the order of the global batch, in float64.
        """
        mask, group = self._valid(valid)
        everyone = self._layout.gather(values).cpu().double()[mask]
        return self._on_rows(self._sums(everyone, group) / self._sums(torch.ones_like(everyone), group), values, mask)

    def log_mean(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """The same of numbers of which `values` are the logarithms: log mean exp."""
        mask, group = self._valid(valid)
        everyone = self._layout.gather(values).cpu().double()[mask]
        most = torch.zeros(self._groups, dtype=torch.float64).scatter_reduce(
            0, group, everyone, "amax", include_self=False
        )
        share = self._sums((everyone - most[group]).exp(), group) / self._sums(torch.ones_like(everyone), group)
        return self._on_rows(share.log() + most, values, mask)

    def write(self, values: Mapping[str, Tensor], valid: Tensor | None = None) -> None:
        """Store new values of all fields, each [B] and equal on all rows of an id; of `valid` rows alone."""
        mask, group = self._valid(valid)
        everyone = self._layout.gather(torch.stack([values[name] for name in self._table.fields], 1)).cpu()
        rows = torch.arange(len(mask))[mask]
        first = torch.full((self._groups,), len(mask)).scatter_reduce(0, group, rows, "amin")
        first = first[first < len(mask)]
        first = first[self._mine[first]]
        self._table.put(self._ids[first], everyone[first])

    def _sums(self, values: Tensor, group: Tensor) -> Tensor:
        return torch.zeros(self._groups, dtype=torch.float64).index_add(0, group, values)

    def _on_rows(self, by_id: Tensor, like: Tensor, mask: Tensor) -> Tensor:
        """From values by id to this worker's rows that count."""
        return by_id[self._group].where(mask, 0)[self._layout.local].to(like)

    def _valid(self, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """[N] bool: the rows that count and are valid; and the number of the id of each of them."""
        mask = self._counts if valid is None else self._counts & self._layout.gather(valid).cpu()
        return mask, self._group[mask]


def _grouped(ids: Tensor) -> tuple[Tensor, int]:
    """The number of each row's id among the distinct ones, and how many those are; one half of the ids at a time,
    which is several times faster than to sort them whole.
    """
    first, second = (half.unique(return_inverse=True)[1] for half in ids.T)
    distinct, group = (first * len(ids) + second).unique(return_inverse=True)
    return group, len(distinct)
