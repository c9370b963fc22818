"""Several values by one collective, over real workers, equal what one collective each gives."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.objectives import ObjectiveConfig, build_objective
from cl.pairs import Pairs
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


def summed(workers: Workers, rows: tuple[int, ...]) -> list[Tensor]:
    """What each worker gets of values of all rows, by one collective."""
    generator = torch.Generator().manual_seed(workers.rank)
    total = sum(rows)
    layout = workers.layout(rows[workers.rank], torch.device("cpu"))
    every = [torch.randn(total, *shape, generator=generator, dtype=torch.float64) for shape in ((), (3,), (2, 2), (0,))]
    return layout.reduce_scatter_together([*every, every[0].float()])


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_sums_of_several_values_come_home_together(pool: Pool, rows: tuple[int, ...]) -> None:
    made = []
    for rank in range(len(rows)):
        generator = torch.Generator().manual_seed(rank)
        shapes = ((), (3,), (2, 2), (0,))
        made.append([torch.randn(sum(rows), *s, generator=generator, dtype=torch.float64) for s in shapes])
    wanted = [torch.stack(parts).sum(0) for parts in zip(*made, strict=True)]
    for rank, found in enumerate(pool.run(summed, len(rows), rows)):
        mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        for value, total in zip(found, wanted, strict=False):
            assert value.shape == total[mine].shape
            torch.testing.assert_close(value, total[mine], rtol=1e-12, atol=1e-12)
        assert found[-1].dtype == torch.float32


def gathered_shapes(workers: Workers, name: str) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """Shapes of what is gathered in a step, and the gradients of two backward passes over the same graph."""
    torch.manual_seed(workers.rank)
    leaves = [torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    objective = build_objective(ObjectiveConfig.model_validate({"name": name, "exchange": "gather"})).double()
    shapes: list[tuple[int, ...]] = []
    gather = dist.all_gather_single

    def counted(out: Tensor, value: Tensor, **settings: Any) -> Any:
        shapes.append(tuple(value.shape))
        return gather(out, value, **settings)

    with mock.patch.object(dist, "all_gather_single", counted):
        pairs = Pairs({view: normalize(leaf, dim=1) for view, leaf in zip("ab", leaves, strict=True)})
        loss = objective(pairs, workers).loss
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        seen = list(shapes)
        again = torch.autograd.grad(loss, leaves)
    return seen, [*first, *again]


@pytest.mark.parametrize("name", ["infonce", "siglip", "dcl", "ascl"])
def test_candidates_travel_once_a_step(pool: Pool, name: str) -> None:
    """Through all passes and backward; a second backward over the same graph may ask for them again."""
    for shapes, gradients in pool.run(gathered_shapes, 3, name):
        assert shapes.count((3, 7)) == 1
        for first, again in zip(gradients[:2], gradients[2:], strict=True):
            torch.testing.assert_close(first, again, rtol=1e-12, atol=1e-12)


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
