"""Directions from the gradients of several losses equal what their papers define, on the gradients themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from cl.objectives.combined.conflicts import coefficients, least_norm, projected
from cl.objectives.schedule import Ramp, value_at
from cl.pairs import Clock


def gradients(seed: int, count: int, size: int = 7) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_least_norm_is_the_least(seed: int, count: int) -> None:
    """Against a general solver of min |sum alpha_k g_k|^2 over the simplex."""
    g = gradients(seed, count)
    gram = (g @ g.T).numpy()
    start = np.full(count, 1 / count)
    simplex = {"type": "eq", "fun": lambda a: a.sum() - 1}
    best = minimize(
        lambda a: a @ gram @ a, start, jac=lambda a: 2 * gram @ a, bounds=[(0, 1)] * count, constraints=[simplex]
    )
    alpha = least_norm(torch.from_numpy(gram), iterations=20000)
    assert float(alpha.min()) >= 0
    assert float(alpha.sum()) == pytest.approx(1)
    assert float((alpha @ g).square().sum()) <= best.fun + 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(0, 5))
def test_projection_is_the_algorithm_on_vectors(seed: int, count: int, step: int) -> None:
    """Yu et al. 2020, algorithm 1, on whole gradients, in the same order of the others."""
    g = gradients(seed, count, size=3)
    total = torch.zeros(3, dtype=torch.float64)
    for k in range(count):
        mine = g[k].clone()
        others = [j for j in range(count) if j != k]
        turn = step % len(others)
        for j in others[turn:] + others[:turn]:
            if mine @ g[j] < 0:
                mine -= (mine @ g[j]) / (g[j] @ g[j]) * g[j]
        total += mine
    torch.testing.assert_close(projected(g @ g.T, step) @ g, total)


def test_gradients_that_agree_are_added() -> None:
    g = torch.eye(3, dtype=torch.float64) + 0.1
    torch.testing.assert_close(coefficients("project", g @ g.T, 0), torch.ones(3, dtype=torch.float64))


def test_a_loss_without_gradient_does_no_harm() -> None:
    g = torch.stack([torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)])
    assert coefficients("normalise", g @ g.T, 0).tolist() == [0.5, 0.0]
    assert coefficients("project", g @ g.T, 0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("ramp", "values"),
    [
        (Ramp(start=1, end=3), {0: 1, 50: 2, 100: 3}),
        (Ramp(start=1, end=3, shape="cosine"), {0: 1, 25: 1 + (1 - 2**-0.5), 50: 2, 100: 3}),
        (Ramp(start=1, end=3, shape="step", finish=0.5), {0: 1, 49: 1, 50: 3, 100: 3}),
        (Ramp(start=0, end=1, begin=0.2, finish=0.4), {0: 0, 20: 0, 30: 0.5, 40: 1, 90: 1}),
        (Ramp(start=5, end=1, begin=0.3, finish=0.3), {29: 5, 30: 1}),
        (0.25, {0: 0.25, 100: 0.25}),
    ],
)
def test_ramps(ramp: Ramp | float, values: dict[int, float]) -> None:
    for step, value in values.items():
        assert value_at(ramp, Clock(step, 100)) == pytest.approx(value)
