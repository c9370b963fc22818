"""The table of numbers by sample, on real workers: equal to a dict, for any number of them and when it changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cl.engine.collectives import Workers
from cl.errors import DataError
from cl.memory.index import IdIndex
from cl.memory.shards import everyones, load_tables, save_tables
from cl.memory.table import SampleTable
from tests.distributed.pool import Pool

FIELDS = {"count": 0.0, "mean": -1.0}


class Holder(nn.Module):
    def __init__(self, fields: dict[str, float] | None = None) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"table": SampleTable(fields or FIELDS)})

    @property
    def table(self) -> SampleTable:
        table = self.inner["table"]
        assert isinstance(table, SampleTable)
        return table


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [12, 2] with repetitions, weights with zeros, and values of one global batch."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 9, (12, 2), generator=generator) % torch.tensor([9, 2])
    weight = (torch.rand(12, generator=generator, dtype=torch.float64) < 0.8).double()
    return ids, weight, torch.randn(12, generator=generator, dtype=torch.float64)


def expected(steps: int) -> dict[tuple[int, ...], tuple[float, float]]:
    """What a dict on one process keeps: how often an id was met, and the mean of its last batch's values."""
    kept: dict[tuple[int, ...], tuple[float, float]] = {}
    for step in range(steps):
        ids, weight, values = batch(step)
        for key in {tuple(row) for row in ids.tolist()}:
            rows = [i for i, row in enumerate(ids.tolist()) if tuple(row) == key and weight[i] > 0]
            if rows:
                kept[key] = (kept.get(key, (0.0, 0.0))[0] + 1, float(values[rows].mean()))
    return kept


def cut(workers: Workers) -> slice:
    """Uneven parts; of three workers the second has none."""
    bounds = {1: [0, 12], 2: [0, 5, 12], 3: [0, 8, 8, 12]}[workers.size]
    return slice(bounds[workers.rank], bounds[workers.rank + 1])


def steps_on(workers: Workers, first: int, last: int, source: str | None, target: str) -> tuple[Tensor, Tensor]:
    """Take steps, from the files of `source` to those of `target`; this worker's ids and values at the end."""
    holder = Holder()
    if source is not None:
        names = [str(path.relative_to(source)) for path in Path(source).rglob("*.safetensors")]
        load_tables(holder, names, lambda name: (Path(source) / name).read_bytes(), workers)
    for step in range(first, last):
        ids, weight, values = (each[cut(workers)] for each in batch(step))
        visit = holder.table.visit(ids, weight, workers)
        mean = visit.mean(values)
        torch.testing.assert_close(visit.log_mean(values).exp()[weight > 0], visit.mean(values.exp())[weight > 0])
        visit.write({"count": visit.values["count"] + 1, "mean": mean})
    names = everyones(save_tables(holder, target, workers), workers)
    assert names == [f"inner.table/{rank:05d}-of-{workers.size:05d}.safetensors" for rank in range(workers.size)]
    return holder.table.index.ids, holder.table.values


def test_equals_a_dict_while_workers_change_from_two_to_one_to_three(pool: Pool, tmp_path: Path) -> None:
    source, done = None, 0
    for number, size in enumerate((2, 1, 3)):
        target = str(tmp_path / str(number))
        answers = pool.run(steps_on, size, done, done + 4, source, target)
        source, done = target, done + 4
        kept = expected(done)
        held = [(tuple(key), value) for ids, values in answers for key, value in zip(ids.tolist(), values, strict=True)]
        assert len(held) == len(kept)  # nobody holds what another holds
        assert dict(held).keys() == kept.keys()
        for key, value in held:
            torch.testing.assert_close(value, torch.tensor(kept[key], dtype=torch.float64), rtol=1e-14, atol=1e-14)
        if size > 1:
            assert sum(len(ids) > 0 for ids, _ in answers) > 1  # it is spread


def test_first_visit_reads_the_defaults_and_masked_rows_leave_no_trace() -> None:
    table = SampleTable(FIELDS)
    ids = torch.tensor([[1, 2], [3, 4]])
    visit = table.visit(ids, torch.tensor([1.0, 0.0]), Workers())
    assert visit.values["mean"].tolist() == [-1.0, -1.0]
    visit.write({"count": torch.tensor([5.0, 6.0]), "mean": torch.tensor([7.0, torch.nan])})
    assert table.index.ids.tolist() == [[1, 2]]
    assert table.visit(ids, torch.ones(2), Workers()).values["count"].tolist() == [5.0, 0.0]


def test_index_finds_every_id_of_many_and_no_other() -> None:
    """100,000 ids in uneven pieces, ids that agree in one half and ids that follow each other included."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-(2**62), 2**62, (100_000, 2), generator=generator)
    ids[::3, 0] = 7
    ids[1::3] = torch.arange(len(ids[1::3]))[:, None]
    index, start = IdIndex(), 0
    for size in (1, 10, 3_000, 40_000, 56_989):
        rows = index.add(ids[start : start + size])
        assert rows.tolist() == list(range(start, start + size))
        start += size
    order = torch.randperm(len(ids), generator=generator)
    assert torch.equal(index.find(ids[order]), order)
    assert (index.find(ids ^ (1 << 50)) == -1).all()


def test_memory_of_a_sample_is_as_stated() -> None:
    """16 bytes of id, 8 to 16 of index, 4 for each field, times at most 1.5 for room to grow."""
    table = SampleTable(dict.fromkeys("abcdef", 0.0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        table.put(torch.randint(-(2**62), 2**62, (5000, 2), generator=generator), torch.zeros(5000, 6))
        count = table.index.count
        assert table.bytes <= 1.5 * count * (16 + 4 * 6) + max(16 * count, 4 * 1024) + 1024


def test_files_that_are_missing_or_of_another_table_are_refused(tmp_path: Path) -> None:
    names = save_tables(Holder(), str(tmp_path), Workers())

    def read(name: str) -> bytes:
        return (tmp_path / name).read_bytes()

    with pytest.raises(DataError, match="expected ids, other"):
        load_tables(Holder({"other": 0.0}), names, read, Workers())
    with pytest.raises(DataError, match="there are 1 files of 2"):
        load_tables(Holder(), [names[0].replace("of-00001", "of-00002")], read, Workers())
    with pytest.raises(DataError, match="there are 0 files"):
        load_tables(Holder(), [], read, Workers())
