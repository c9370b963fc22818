"""What estimates, temperatures of samples and queues become at their limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cl.engine.collectives import Workers
from cl.errors import ConfigError
from cl.memory.table import SampleTable
from cl.objectives import Objective, ObjectiveConfig, build_objective
from cl.pairs import Clock, Pairs
from tests.unit.simple_batches import DIMENSIONS, assert_same, batch, made, outcome, unit_rows

SEEDS = st.integers(0, 10**6)
GLOBAL = ["fastclip-v0", "fastclip-v1", "fastclip-v2", "fastclip-v3", "sogclr", "isogclr"]


def table_of(objective: Objective) -> SampleTable:
    assert isinstance(objective.table, SampleTable)
    return objective.table


def field(objective: Objective, name: str) -> Tensor:
    """A field of all samples, in the order of their ids."""
    table = table_of(objective)
    return table.values[table.index.ids[:, 0].argsort(), list(table.fields).index(name)]


def log_g(pairs: Pairs, tau: float | Tensor) -> list[Tensor]:
    """log mean over the others of exp((s_ij - s_ii) / tau), both directions."""
    a, b = pairs.views["a"], pairs.views["b"]
    scores = a @ b.T / tau
    scores = scores - torch.eye(len(a)) * 1e9
    own = (a * b).sum(1) / tau
    return [lse - own - math.log(len(a) - 1) for lse in (scores.logsumexp(1), scores.logsumexp(0))]


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from(GLOBAL), st.floats(0.05, 1.0))
def test_at_gamma_one_the_gradient_is_that_of_the_logarithm(seed: int, name: str, tau: float) -> None:
    """That of mean (log g1 + log g2) / 2 to the embeddings, times tau for v3; also where samples come again."""
    temperature = {"tau": tau} if name in ("fastclip-v2", "isogclr") else {"temperature": tau}
    objective = made(name, **temperature, gamma=1.0, epsilon=0.0, **({"tau_max": 1.0} if "tau" in temperature else {}))
    for step in range(2):
        if step and name in ("fastclip-v2", "isogclr"):
            break  # the temperatures have moved
        pairs = batch(seed + step)
        _, grads = outcome(objective, pairs)
        plain = sum(log_g(pairs, tau)).mean() / 2  # type: ignore[union-attr]
        expected = torch.autograd.grad(plain, list(pairs.views.values()))
        for grad, slope in zip(grads, expected, strict=False):
            torch.testing.assert_close(grad, slope * (tau if name == "fastclip-v3" else 1), rtol=1e-5, atol=1e-8)


def test_gamma_is_a_cosine_by_epoch_or_constant() -> None:
    cosine = made("fastclip-v1", gamma=0.2, gamma_decay_epochs=4)
    found = [cosine.gamma(Clock(0, 1, epoch, 10)) for epoch in range(6)]  # type: ignore[operator]
    expected = [0.5 * (1 + math.cos(math.pi * epoch / 4)) * 0.8 + 0.2 for epoch in range(4)] + [0.2, 0.2]
    assert found == pytest.approx(expected)
    assert found[0] == 1
    half = made("fastclip-v1", gamma=0.2)
    assert half.gamma(Clock(0, 1, 5, 10)) == 0.2  # type: ignore[operator]
    assert half.gamma(Clock(0, 1, 4, 10)) > 0.2  # type: ignore[operator]
    assert made("sogclr", gamma=0.7).gamma(Clock(0, 1, 0, 10)) == 0.7  # type: ignore[operator]


def test_rows_of_one_sample_move_one_estimate_by_their_mean() -> None:
    ids = torch.tensor([[0, 0], [1, 0], [0, 0], [2, 0], [3, 0]])
    pairs = batch(1, 5, ids=ids)
    objective = made("sogclr", temperature=0.5)
    outcome(objective, pairs)
    first = log_g(pairs, 0.5)[0].exp().detach()
    expected = torch.stack([(first[0] + first[2]) / 2, first[1], first[3], first[4]]).log()
    torch.testing.assert_close(field(objective, "log_u.0"), expected)


def test_masked_samples_and_samples_without_negatives_keep_what_they_had() -> None:
    objective = made("sogclr")
    outcome(objective, batch(0, weight=torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1], dtype=torch.float64)))
    assert sorted(table_of(objective).index.ids[:, 0].tolist()) == [0, 2, 3, 5, 6, 7]
    alone = made("sogclr")
    loss, grads = outcome(alone, batch(0, 1))
    assert loss == 0
    assert not any(grad.any() for grad in grads)
    assert table_of(alone).index.count == 0


@pytest.mark.parametrize("name", GLOBAL)
def test_underflowing_negatives_give_finite_numbers(name: str) -> None:
    """At scale 100 and with negatives opposite to the anchor g is e^-200, 0 in float32; log u is what is kept."""
    side = torch.zeros(2, DIMENSIONS)
    side[0, 0], side[1, 0] = 1, -1
    views = {"a": side.clone().requires_grad_(), "b": side.clone().requires_grad_()}
    tempered = {"tau": 0.01} if name in ("fastclip-v2", "isogclr") else {"temperature": 0.01}
    objective = build_objective(ObjectiveConfig.model_validate({"name": name, **tempered}), DIMENSIONS)
    for step in range(2):
        pairs = Pairs(views, ids=torch.tensor([[0, 0], [1, 0]]), clock=Clock(step, 2, 1, 2))
        loss, grads = outcome(objective, pairs)
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)
        if step == 0:
            torch.testing.assert_close(field(objective, "log_u.0"), torch.full((2,), -200.0))


def test_the_codes_rule_counts_the_slope_of_g_twice() -> None:
    """v3: loss and gradients to the embeddings are equal; d/dtau differs by tau mean(dg/dtau / u) / 2, both ways."""
    pairs = batch(4)
    found = {
        rule: outcome(made("fastclip-v3", temperature=0.3, epsilon=0.0, temperature_rule=rule), pairs)
        for rule in ("paper", "code")
    }
    assert_same((found["paper"][0], found["paper"][1][:2]), (found["code"][0], found["code"][1][:2]))
    log_scale = torch.tensor(-math.log(0.3), dtype=torch.float64, requires_grad=True)
    tau = (-log_scale).exp()
    (once,) = torch.autograd.grad(0.3 * torch.stack(list(log_g(pairs, tau))).sum(0).mean() / 2, log_scale)
    torch.testing.assert_close(found["code"][1][2] - found["paper"][1][2], once, rtol=1e-5, atol=1e-8)


def test_temperatures_of_samples_stay_in_their_range_and_move_by_lr_in_the_first_epoch() -> None:
    """With betas 0, Adam's step is the sign of the gradient."""
    objective = made("fastclip-v2", tau=0.05, rho=0.0, temperature_lr=0.001)
    outcome(objective, batch(3, clock=Clock(0, 4, 0, 4)))
    torch.testing.assert_close((field(objective, "tau.0") - 0.05).abs(), torch.full((8,), 0.001, dtype=torch.float64))
    far = made("fastclip-v2", tau=0.05, rho=1000.0, temperature_lr=10.0)
    outcome(far, batch(3, clock=Clock(0, 4, 0, 4)))
    assert (field(far, "tau.1") == 0.01).all()
    with pytest.raises(ConfigError, match="tau must lie between"):
        made("fastclip-v2", tau=2.0)


def test_samples_need_ids() -> None:
    pairs = Pairs({"a": unit_rows(0), "b": unit_rows(1)})
    with pytest.raises(Exception, match="no sample ids"):
        made("sogclr")(pairs, Workers())


TEACHERS = ("a", "b", "a_teacher", "b_teacher")


def test_an_empty_queue_teaches_nothing() -> None:
    loss, grads = outcome(made("moco", queue=4), batch(0, names=TEACHERS))
    assert loss == 0
    assert not any(grad.any() for grad in grads)


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_without_a_queue_it_is_infonce_against_the_teacher(seed: int) -> None:
    """With keys of the batch and an empty queue; and v3 is 2 tau times both directions."""
    pairs = batch(seed, names=TEACHERS)

    def against(query: str, key: str) -> tuple[Tensor, list[Tensor]]:
        objective = made("infonce", direction="forward", temperature=0.2, learn_temperature=False, views=(query, key))
        return outcome(objective, pairs)

    forward, backward = against("a", "b_teacher"), against("b", "a_teacher")
    assert_same(outcome(made("moco", queue=4, in_batch=True, temperature=0.2), pairs), forward)
    both = (forward[0] + backward[0], [x + y for x, y in zip(forward[1], backward[1], strict=True)])
    objective = made("moco-v3", temperature=0.2)
    scale = objective.temperature()  # type: ignore[operator]
    assert_same(outcome(objective, pairs), both, 2 / float(scale))


def test_a_queue_goes_on_after_it_was_saved() -> None:
    """Content columns, which only batches know, come back with the state."""
    setting: dict[str, Any] = {"queue": 20, "direction": "both"}
    contents = torch.arange(16).view(8, 2) % 5
    first, again = made("moco", **setting), made("moco", **setting)
    outcome(first, batch(0, names=TEACHERS, content=contents))
    again.load_state_dict(first.state_dict())
    following = batch(1, names=TEACHERS, content=contents)
    assert_same(outcome(again, following), outcome(first, following))
    assert outcome(again, following)[0] > 0
