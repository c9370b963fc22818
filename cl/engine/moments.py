"""Moments of all workers' rows, for objectives that are functions of a few global numbers rather than of pairs.

Sums, means, covariances, Gram matrices and Sinkhorn assignments. Every worker computes the same loss from the same
global moments and passes it through `replicated`, which makes its gradients follow the convention of
`cl.engine.collectives`: exact for embeddings and for parameters, also where one moment is built on another.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cl.engine.collectives import Workers


class _TotalOverWorkers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, workers: Workers) -> Tensor:
        ctx.workers = workers
        return workers.all_reduce(value.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # What each worker makes of the total is its own part of the loss; the parts add up.
        return ctx.workers.all_reduce(grad.clone()), None


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, workers: Workers) -> Tensor:
        ctx.factor = workers.averaged_by / workers.size
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def total(value: Tensor, workers: Workers) -> Tensor:
    """The sum over workers of each worker's `value`, with gradient."""
    return _TotalOverWorkers.apply(value, workers)


def replicated(loss: Tensor, workers: Workers) -> Tensor:
    """A loss that every worker has computed from global moments: the same value, a gradient that counts it once."""
    return _Replicated.apply(loss, workers)


def mean(rows: Tensor, weight: Tensor, workers: Workers) -> Tensor:
    """sum_i w_i x_i / sum_i w_i over all workers: [D] of rows [B, D]; zeros where no row counts."""
    kept = rows.where((weight > 0)[:, None], 0)
    count = workers.all_reduce(weight.sum().detach().clone())
    return total((weight[:, None] * kept).sum(0), workers) / count.where(count > 0, 1)


def covariance(rows: Tensor, weight: Tensor, workers: Workers, correction: float = 1.0) -> Tensor:
    """sum_i w_i (x_i - m)(x_i - m)^T / (sum_i w_i - correction): [D, D] of rows [B, D] of all workers.

    Rows are centred before they are multiplied, which keeps the precision that E[xx] - E[x]E[x] would lose.
    """
    return cross_covariance(rows, rows, weight, workers, correction)


def cross_covariance(
    first: Tensor, second: Tensor, weight: Tensor, workers: Workers, correction: float = 1.0
) -> Tensor:
    """sum_i w_i (x_i - m_x)(y_i - m_y)^T / (sum_i w_i - correction): [D, E] of rows [B, D] and [B, E]."""
    keep = (weight > 0)[:, None]
    x = (first - mean(first, weight, workers)).where(keep, 0)
    y = (second - mean(second, weight, workers)).where(keep, 0)
    count = workers.all_reduce(weight.sum().detach().clone()) - correction
    return total((weight[:, None] * x).T @ y, workers) / count.where(count > 0, 1)


def gram(rows: Tensor, weight: Tensor, workers: Workers) -> Tensor:
    """sum_i w_i x_i x_i^T over all workers: [D, D]."""
    kept = rows.where((weight > 0)[:, None], 0)
    return total((weight[:, None] * kept).T @ kept, workers)


def sinkhorn(scores: Tensor, weight: Tensor, workers: Workers, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Balanced soft assignments of all workers' samples to K prototypes: [B, K], rows sum to 1; no gradient.

    Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", section 3.1:
    Q = diag(u) exp(scores / epsilon) diag(v), each prototype with an equal share of the samples. Computed on
    logarithms, so that it neither over- nor underflows; masked samples take no part and get zeros.
    """
    with torch.no_grad():
        log_q = (scores / epsilon).masked_fill((weight == 0)[:, None], -torch.inf)
        log_samples = workers.all_reduce((weight > 0).sum()).to(scores.dtype).clamp_min(1).log()
        log_prototypes = math.log(scores.shape[1])
        for _ in range(iterations):
            log_q = log_q - _log_sum_over_workers(log_q, workers) - log_prototypes
            rows = log_q.logsumexp(1, keepdim=True)
            log_q = log_q - rows.where(rows > -torch.inf, 0) - log_samples
        return (log_q + log_samples).exp()


def _log_sum_over_workers(values: Tensor, workers: Workers) -> Tensor:
    """log of the sum over all workers' rows of exp values: [K] of [B, K]."""
    local = values.logsumexp(0)
    largest = workers.all_reduce(local.clone(), dist.ReduceOp.MAX)
    shift = largest.where(largest > -torch.inf, 0)
    return workers.all_reduce((local - shift).exp()).log() + shift
