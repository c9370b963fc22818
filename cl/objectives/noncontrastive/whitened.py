"""Any objective on whitened embeddings: dimensions are shuffled into groups, each group whitened over the global batch.

    x^(k) = P_k^T ZCA_groups(P_k x),  P_k a permutation of the dimensions;   L = 1/K sum_k L_inner(normalise x^(k))

Zhuo et al. 2023, "WhitenedCSE: Whitening-based Contrastive Learning of Sentence Embeddings" (shuffled
group whitening; the K shufflings are several positives of the same sentence). ZCA: Cov^(-1/2) (x - mean) by the
eigenvalues of the group's covariance. The permutations are functions of the seed and the step. Groups must hold fewer
dimensions than the batch has samples.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from cl.config import Config
from cl.engine import moments, randomness
from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES, Objective, ObjectiveConfig, build_objective
from cl.pairs import Pairs


class WhitenedConfig(Config):
    objective: ObjectiveConfig = Field(description="the objective on whitened embeddings")
    group: int = Field(64, ge=1, description="dimensions of a group; the last may be smaller")
    shuffles: int = Field(1, ge=1, description="K, permutations of the dimensions a step")
    eps: float = Field(1e-4, gt=0, description="added to the eigenvalues")
    seed: int = Field(0, description="of the permutations")


@OBJECTIVES.register(
    "whitened",
    "any objective on embeddings that are whitened in shuffled groups of dimensions",
    paper="Whitening-based Contrastive Learning of Sentence Embeddings",
)
class Whitened(Objective):
    """See the module's formula. What the inner objective is, it is on whitened views."""

    Config = WhitenedConfig
    compares = "what the inner objective compares"
    needs = ("what the inner objective needs",)
    memory = "batch x dim + dim x group"

    def __init__(self, config: WhitenedConfig, inner: Objective) -> None:
        super().__init__()
        self.config, self.inner = config, inner

    @classmethod
    def build(cls, config: Any, dimensions: int | None) -> Whitened:
        return cls(config, build_objective(config.objective, dimensions))

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for shuffle in range(self.config.shuffles):
            views = {
                name: unit(self.whiten(view, pairs.view_weights(name), shuffle, pairs.clock.step, workers))
                for name, view in pairs.views.items()
            }
            outcome = self.inner(replace(pairs, views=views), workers)
            losses.append(outcome.loss / self.config.shuffles)
            metrics |= outcome.metrics
        return Outcome(torch.stack(losses).sum(), metrics)

    def whiten(self, view: Tensor, weight: Tensor, shuffle: int, step: int, workers: Workers) -> Tensor:
        """One view [B, D], whitened group by group."""
        dimensions = torch.arange(view.shape[1], device=view.device)
        order = randomness.bits(self.config.seed + shuffle, step, dimensions).argsort()
        counted = (weight > 0).to(weight.dtype)
        rows = view.to(weight.dtype).where((weight > 0)[:, None], 0)
        done = []
        for group in order.split(self.config.group):
            part = rows[:, group]
            covariance = moments.covariance(part, counted, workers, correction=0)
            identity = torch.eye(len(group), dtype=rows.dtype, device=rows.device)
            root = inverse_root(covariance + self.config.eps * identity)
            done.append((part - moments.mean(part, counted, workers)) @ root)
        return torch.cat(done, 1)[:, order.argsort()].where((weight > 0)[:, None], 0)

    def clamp_(self) -> None:
        self.inner.clamp_()


def inverse_root(matrix: Tensor) -> Tensor:
    """M^(-1/2) of a symmetric positive matrix, with a gradient that is finite for equal eigenvalues.

    The gradient of a function f of a symmetric matrix needs the divided differences (f(l_i) - f(l_j)) / (l_i - l_j),
    which for f(l) = l^(-1/2) is -1 / (sqrt l_i sqrt l_j (sqrt l_i + sqrt l_j)): no difference in any denominator.
    """
    return _InverseRoot.apply(matrix)


class _InverseRoot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        root = values.sqrt()
        ctx.save_for_backward(root, vectors)
        return (vectors / root) @ vectors.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        root, vectors = ctx.saved_tensors
        slope = -1 / (root[:, None] * root * (root[:, None] + root))
        return vectors @ (slope * (vectors.T @ grad @ vectors)) @ vectors.T
