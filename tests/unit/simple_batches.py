"""Small batches on one process, and what an objective makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl.engine.collectives import Workers
from cl.objectives import Objective, ObjectiveConfig, build_objective
from cl.pairs import Clock, Pairs

DIMENSIONS = 5


def unit_rows(seed: int, rows: int = 8, spread: float = 1.0) -> Tensor:
    """[rows, DIMENSIONS] of length 1, float64; a small `spread` puts them close together."""
    values = torch.randn(rows, DIMENSIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = torch.ones(DIMENSIONS, dtype=torch.float64) * (1 - spread) + spread * values
    return values / values.norm(dim=1, keepdim=True)


def batch(seed: int, rows: int = 8, names: tuple[str, ...] = ("a", "b"), spread: float = 1.0, **known: Any) -> Pairs:
    """Views named *teacher get no gradient; ids are 0, 1, ... unless they are given."""
    views = {
        name: unit_rows(10 * seed + place, rows, spread).requires_grad_(not name.endswith("teacher"))
        for place, name in enumerate(names)
    }
    known.setdefault("ids", torch.stack([torch.arange(rows), torch.zeros(rows, dtype=torch.int64)], 1))
    known.setdefault("clock", Clock(3, 10, 1, 4))
    return Pairs(views, **known)


def made(name: str, **settings: Any) -> Objective:
    objective = build_objective(ObjectiveConfig.model_validate({"name": name, **settings}), DIMENSIONS)
    return objective.double()


def outcome(objective: Objective, pairs: Pairs) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradient to every view that is trained and to the objective's parameters."""
    loss = objective(pairs, Workers()).loss
    leaves = [view for view in pairs.views.values() if view.requires_grad] + list(objective.parameters())
    return loss.detach(), list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def assert_same(first: tuple[Tensor, list[Tensor]], second: tuple[Tensor, list[Tensor]], factor: float = 1.0) -> None:
    """Loss and gradients of the first are `factor` times those of the second."""
    torch.testing.assert_close(first[0], factor * second[0], rtol=1e-9, atol=1e-10)
    for one, other in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(one, factor * other, rtol=1e-9, atol=1e-10)
