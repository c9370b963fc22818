"""Moments over uneven workers equal those of all rows in one process, with their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cl.engine.collectives import Workers
from cl.engine.moments import covariance, cross_covariance, gram, mean, replicated, sinkhorn
from tests.distributed.pool import Pool, gradient

SIZES = [(7,), (3, 5), (4, 0, 4)]


def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(rows, 4, generator=generator, dtype=torch.float64) + 3 for _ in range(2))
    weight = torch.rand(rows, generator=generator, dtype=torch.float64)
    weight[2] = 0
    return x, y, weight


def loss_of(x: Tensor, y: Tensor, weight: Tensor, workers: Workers) -> Tensor:
    """A function of every moment, with slopes that differ by entry."""
    slope = torch.arange(16, dtype=torch.float64).view(4, 4)
    loss = (
        (mean(x, weight, workers) ** 3).sum()
        + (covariance(x, weight, workers, correction=0.5) * slope).pow(2).sum()
        + (cross_covariance(x, y, weight, workers, correction=0.0) * slope).sum()
        + (gram(y, weight, workers) * slope).sum()
    )
    return replicated(loss, workers)


def dense(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    slope = torch.arange(16, dtype=torch.float64).view(4, 4)
    keep = weight > 0
    x, y, w = x[keep], y[keep], weight[keep][:, None]
    n = w.sum()
    mean_x, mean_y = (w * x).sum(0) / n, (w * y).sum(0) / n
    outer = lambda a, b: torch.einsum("ni,nj->ij", a, b)  # noqa: E731
    return (
        (mean_x**3).sum()
        + ((outer(w * x, x) - n * torch.outer(mean_x, mean_x)) / (n - 0.5) * slope).pow(2).sum()
        + ((outer(w * x, y) - n * torch.outer(mean_x, mean_y)) / n * slope).sum()
        + (outer(w * y, y) * slope).sum()
    )


def _on_worker(workers: Workers, rows: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    start = sum(rows[: workers.rank])
    x, y, weight = (value[start : start + rows[workers.rank]] for value in batch(sum(rows)))
    x.requires_grad_()
    y.requires_grad_()
    loss = loss_of(x, y, weight, workers)
    loss.backward()
    return loss.detach(), gradient(x), gradient(y)


@pytest.mark.parametrize("rows", SIZES, ids=str)
def test_moments(pool: Pool, rows: tuple[int, ...]) -> None:
    x, y, weight = batch(sum(rows))
    x.requires_grad_()
    y.requires_grad_()
    expected = dense(x, y, weight)
    expected.backward()
    answers = pool.run(_on_worker, len(rows), rows)
    for answer in answers:
        torch.testing.assert_close(answer[0], expected.detach(), rtol=1e-11, atol=1e-12)
    for number, leaf in ((1, x), (2, y)):
        found = torch.cat([answer[number] for answer in answers]) / len(rows)
        torch.testing.assert_close(found, leaf.grad, rtol=1e-10, atol=1e-11)


def _assign(workers: Workers, rows: tuple[int, ...], scale: float) -> Tensor:
    start = sum(rows[: workers.rank])
    x, _, weight = batch(sum(rows))
    mine = slice(start, start + rows[workers.rank])
    return sinkhorn(scale * x[mine], weight[mine], workers, epsilon=0.5, iterations=50)


@pytest.mark.parametrize("rows", SIZES, ids=str)
def test_sinkhorn(pool: Pool, rows: tuple[int, ...]) -> None:
    """The plain iteration on exponentials, all samples in one matrix."""
    x, _, weight = batch(sum(rows))
    keep = weight > 0
    q = (x[keep] / 0.5).exp()
    for _ in range(50):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    expected = torch.zeros_like(x)
    expected[keep] = q * q.shape[0]
    found = torch.cat(pool.run(_assign, len(rows), rows, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.sum(1), keep.double(), rtol=1e-10, atol=1e-12)
    # Each prototype has an equal share of the samples.
    share = torch.full((4,), float(keep.sum()) / 4, dtype=torch.float64)
    torch.testing.assert_close(found.sum(0), share, rtol=1e-6, atol=1e-8)


def test_sinkhorn_does_not_overflow(pool: Pool) -> None:
    """exp(1000 / 0.5) is infinite; the logarithmic form is not."""
    assert torch.cat(pool.run(_assign, 2, (3, 5), 1000.0)).isfinite().all()
