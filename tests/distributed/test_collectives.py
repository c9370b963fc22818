"""Several values by one collective, over real workers, equal what one collective each gives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cl.engine.collectives import Workers
from tests.distributed.pool import Pool

ROWS = [(1,), (4, 4), (0, 1), (1, 0, 0), (3, 1, 2), (1, 1, 0, 5)]


def values(rows: int, rank: int) -> list[Tensor]:
    """Rows of several types and shapes, some of them slices with strides and offsets of their own."""
    generator = torch.Generator().manual_seed(rank)
    wide = torch.randn(rows, 3, 2, generator=generator, dtype=torch.float64)
    return [
        wide[:, 1:, 0],
        torch.randint(100, (rows, 5), generator=generator)[:, 3],
        torch.rand(rows, generator=generator) < 0.5,
        torch.randn(rows, 3, generator=generator).to(torch.bfloat16)[:, 1:],
        torch.empty(rows, 0),
        wide,
    ]


def on_worker(workers: Workers, rows: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    mine = values(rows[workers.rank], workers.rank)
    layout = workers.layout(len(mine[0]), torch.device("cpu"))
    whole = [torch.ones(3), torch.arange(2), torch.full((2, 2), float(workers.rank)), torch.tensor(workers.rank)]
    return (
        layout.gather_together(mine),
        workers.all_reduce_together(whole),
        workers.all_reduce_together(whole[2:], dist.ReduceOp.MAX),
    )


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_together_is_as_one_by_one(pool: Pool, rows: tuple[int, ...]) -> None:
    expected = [torch.cat(parts) for parts in zip(*(values(n, r) for r, n in enumerate(rows)), strict=True)]
    size = len(rows)
    total = size * (size - 1) // 2
    for gathered, sums, largest in pool.run(on_worker, size, rows):
        for found, wanted in zip(gathered, expected, strict=True):
            assert found.dtype == wanted.dtype
            assert found.equal(wanted)
        assert sums[0].equal(torch.full((3,), float(size)))
        assert sums[1].equal(size * torch.arange(2))
        assert sums[2].equal(torch.full((2, 2), float(total)))
        assert int(sums[3]) == total
        assert largest[0].equal(torch.full((2, 2), size - 1.0))
        assert int(largest[1]) == size - 1
