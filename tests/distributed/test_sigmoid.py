"""The fused sigmoid loss over real workers equals algorithm 1 of the paper on one float64 matrix.

The reference multiplies labels z (1 on the diagonal, -1 elsewhere) with logits and sums -log sigmoid over all pairs
that count: not those of masked samples, not other samples of equal content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from cl.engine.collectives import Workers
from cl.engine.sigmoid import sigmoid_loss, softplus_sums
from cl.engine.sweep import Tiling
from tests.distributed.pool import Pool, gradient

Gradients = list[Tensor]  # of anchors, candidates, scale, bias


@dataclass(frozen=True)
class Case:
    """A global batch and how it is divided."""

    rows: tuple[int, ...]
    exchange: Any = "gather"
    tile: tuple[int, int] = (256, 2048)
    repeats: bool = False
    masked: bool = False
    scale: float = 10.0
    bias: float = -3.0
    dtype: torch.dtype = torch.float64
    trained: tuple[bool, bool] = (True, True)

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(sum(self.rows))
        count = sum(self.rows)
        first, second = (
            normalize(torch.randn(count, 6, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)
        )
        content = torch.arange(2 * count).view(count, 2)
        if self.repeats:
            content = torch.randint(0, max(2, count // 2), (count, 2), generator=generator)
        weight = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
        if self.masked:
            weight[torch.rand(count, generator=generator) < 0.4] = 0
            second[weight == 0] = torch.nan  # what a masked sample holds must not matter
        return first.to(self.dtype), second.to(self.dtype), content, weight


def reference(case: Case) -> tuple[Tensor, Gradients]:
    first, second, content, weight = case.batch()
    first, second = first.double().requires_grad_(), second.double().nan_to_num().requires_grad_()
    scale = torch.tensor(case.scale, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(case.bias, dtype=torch.float64, requires_grad=True)
    own = torch.eye(len(first), dtype=torch.bool)
    same = (content[:, None] == content[None]).any(2) & ~own
    apart = same | (weight == 0)[None] | (weight == 0)[:, None]
    z = torch.where(own, 1.0, -1.0).double()
    each = -logsigmoid(z * (scale * first @ second.T + bias)).masked_fill(apart, 0).sum(1)
    loss = (weight * each).sum() / weight.sum()
    return loss.detach(), list(torch.autograd.grad(loss, (first, second, scale, bias)))


def on_worker(workers: Workers, case: Case) -> tuple[Tensor, list[Tensor | None]]:
    """What one worker returns; gradients as they stand before the wrapper averages them."""
    start = sum(case.rows[: workers.rank])
    first, second, content, weight = (value[start : start + case.rows[workers.rank]] for value in case.batch())
    first.requires_grad_(case.trained[0])
    second.requires_grad_(case.trained[1])
    kind = torch.float64 if case.dtype == torch.float64 else torch.float32
    scale, bias = (torch.tensor(value, dtype=kind, requires_grad=True) for value in (case.scale, case.bias))
    loss = sigmoid_loss(
        first,
        second,
        scale,
        bias,
        layout=workers.layout(len(first), first.device),
        weight=weight,
        content=content,
        exchange=case.exchange,
        tiling=Tiling(*case.tile),
    )
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in (first, second, scale, bias)]


def error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / (expected.norm() + 1e-3))


def check(pool: Pool, case: Case, bound: float = 1e-10) -> None:
    loss, expected = reference(case)
    size = len(case.rows)
    answers = pool.run(on_worker, size, case)
    for answer in answers:
        assert error(answer[0], loss) <= bound  # every worker returns the loss of the global batch
    for side in (0, 1):
        found = [answer[1][side] for answer in answers]
        if case.trained[side]:
            # P on the embeddings is undone by the average over P workers; parameters are averaged themselves.
            assert error(torch.cat(found) / size, expected[side]) <= bound
        else:
            assert found == [None] * size
    for parameter in (2, 3):
        assert error(torch.stack([answer[1][parameter] for answer in answers]).mean(), expected[parameter]) <= bound


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("rows", [(7,), (5, 5), (3, 8), (4, 0, 5), (0, 2, 7, 1)], ids=str)
@pytest.mark.parametrize("tile", [(256, 2048), (3, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("batch", ["plain", "repeats and masked"])
def test_equals_the_paper(pool: Pool, exchange: str, rows: tuple[int, ...], tile: tuple[int, int], batch: str) -> None:
    check(pool, Case(rows, exchange, tile, repeats="repeats" in batch, masked="masked" in batch))


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)], ids=str)
def test_a_frozen_tower_changes_no_other_gradient(pool: Pool, exchange: str, trained: tuple[bool, bool]) -> None:
    """Its product is left out; the scale's gradient then comes from the other side."""
    check(pool, Case((4, 0, 6), exchange, (3, 4), masked=True, trained=trained))


def test_local_negatives_are_a_weighted_mean_of_groups(pool: Pool) -> None:
    """exchange=local: L = sum over workers of (weight of worker / weight of all) x loss of worker."""
    case = Case((3, 6), "local", masked=True)
    first, second, content, weight = case.batch()
    expected = torch.zeros(())
    for rows in (slice(0, 3), slice(3, 9)):
        part = (first[rows], second[rows], torch.tensor(case.scale), torch.tensor(case.bias))
        layout = Workers().layout(len(part[0]), first.device)
        loss = sigmoid_loss(*part, layout=layout, weight=weight[rows], content=content[rows], tiling=Tiling())
        expected = expected + loss * weight[rows].sum() / weight.sum()
    for answer in pool.run(on_worker, 2, case):
        assert error(answer[0], expected) < 1e-12


@pytest.mark.parametrize(("scale", "bias"), [(100.0, -10.0), (3000.0, 50.0), (1e4, -1e4)])
def test_large_logits_in_float32(pool: Pool, scale: float, bias: float) -> None:
    """exp(3000) is no number; the loss is 3000 and its slope 1."""
    check(pool, Case((6, 6), tile=(4, 4), scale=scale, bias=bias, dtype=torch.float32), bound=1e-5)


def test_all_masked_is_zero() -> None:
    """0/0 is 0: a step whose samples are all corrupt has no loss and no gradient."""
    leaves = [torch.randn(3, 4), torch.randn(3, 4), torch.tensor(10.0), torch.tensor(-10.0)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    layout = Workers().layout(3, torch.device("cpu"))
    loss = sigmoid_loss(*leaves, layout=layout, weight=torch.zeros(3), tiling=Tiling())
    loss.backward()
    assert loss == 0
    assert not any(gradient(leaf).any() for leaf in leaves)


def test_backward_may_run_twice_and_not_at_all() -> None:
    """Gradients are found in forward: they must survive a second backward, and cost nothing where nobody wants them."""
    first, second, content, weight = Case((7,)).batch()
    leaves = [first.requires_grad_(), second, torch.tensor(10.0).double(), torch.tensor(-10.0).double()]
    known: dict[str, Any] = {"layout": Workers().layout(7, first.device), "weight": weight, "content": content}
    loss = sigmoid_loss(*leaves, **known, tiling=Tiling())
    loss.backward(retain_graph=True)
    once = gradient(first).clone()
    (3 * loss).backward()
    torch.testing.assert_close(gradient(first), 4 * once)
    with torch.no_grad():
        assert sigmoid_loss(*leaves, **known, tiling=Tiling()) == loss


@pytest.mark.parametrize("columns", [1, 2, 3, 63, 65, 2048])
@pytest.mark.parametrize(("spread", "shift"), [(0.0, -17.0), (3.0, -10.0), (300.0, 0.0)])
def test_softplus_sums_keep_small_and_large_terms(columns: int, spread: float, shift: float) -> None:
    """2,048 terms of 4e-8 are not lost beside 1, as log(1 + u) would lose them; nothing overflows."""
    logits = spread * torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)) + shift
    logits[0] = -torch.inf
    logits[1, : columns // 2] = -torch.inf
    exact = torch.logaddexp(logits.double(), torch.zeros((), dtype=torch.float64)).sum(1)
    torch.testing.assert_close(softplus_sums(logits.clone()).double(), exact, rtol=5e-7, atol=1e-37)
