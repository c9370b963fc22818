"""What the objectives on negatives become at the limits of their settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl.errors import ConfigError
from cl.pairs import Clock, Extra, Pairs
from tests.unit.simple_batches import assert_same, batch, made, outcome, unit_rows

SEEDS = st.integers(0, 10**6)
TEACHERS = ("a", "b", "a_teacher", "b_teacher")
UNIQUE = {"class": torch.arange(8)}

# name, settings, and the objective that it then is
LIMITS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("diht", {"beta": 0.0, "alpha": 1.0}, "infonce", {}),
    ("hcl", {"beta": 0.0, "tau_plus": 0.0, "floor": False}, "ntxent", {}),
    ("hcl", {"beta": 0.0}, "debiased", {}),
    ("debiased", {"tau_plus": 0.0, "floor": False, "same_side": False, "direction": "forward"}, "infonce", {}),
    ("false-negative-elimination", {"threshold": 2.0}, "infonce", {}),
    ("false-negative-elimination", {"threshold": 2.0, "same_side": True}, "ntxent", {}),
    ("false-negative-elimination", {"k": 3, "threshold": 2.0}, "infonce", {}),
    ("false-negative-elimination", {"label": "class"}, "infonce", {}),
    ("false-negative-attraction", {"label": "class"}, "infonce", {}),
    ("false-negative-attraction", {"threshold": 2.0, "direction": "forward"}, "infonce", {}),
    ("hardest-negatives", {"k": 7}, "infonce", {}),
    ("hardest-negatives", {"k": 99, "low": -2.0, "margin": 3.0}, "infonce", {}),
    ("hardest-negatives", {"k": None, "same_side": True}, "ntxent", {}),
    ("mined-negatives", {"extra": []}, "infonce", {}),
    ("dclr", {"noise": 0, "threshold": 2.0, "temperature": 0.07}, "infonce", {}),
    ("dclr", {"noise": 0, "teacher": None, "temperature": 0.07}, "infonce", {}),
    ("noise-posterior", {}, "infonce", {}),
    ("noise-posterior", {"use": "soften"}, "infonce", {}),
    ("bad-pair-mining", {}, "infonce", {}),
    ("mixup", {"share": "all"}, "infonce", {}),
]
ONE_WAY = {"mined-negatives", "dclr", "mixup"}


@pytest.mark.parametrize(("name", "fields", "base", "base_fields"), LIMITS)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_limit_is_a_plainer_objective(
    name: str, fields: dict[str, Any], base: str, base_fields: dict[str, Any], seed: int
) -> None:
    labels = {**UNIQUE, "all": torch.ones(8, dtype=torch.float64)}
    pairs = batch(seed, names=TEACHERS, labels=labels, clock=Clock(0, 9, 0, 3))
    two = {**fields, "views": ["a", "b"]}
    if name in ONE_WAY or fields.get("direction") == "forward":
        base_fields = {"direction": "forward", **base_fields}
    views = dict(pairs.views)
    if name == "mixup":
        views["partner"] = unit_rows(seed + 1)
    found = outcome(made(name, **two), replace(pairs, views=views))
    trained = [name for name, view in views.items() if view.requires_grad]
    assert trained == ["a", "b"]
    assert_same(found, outcome(made(base, views=["a", "b"], **base_fields), pairs))


def test_momentum_variants_without_their_addition_are_momentum_contrast() -> None:
    first = batch(0, names=TEACHERS)
    second = batch(1, names=TEACHERS)
    for name, fields in (
        ("mochi", {"mixed": 0, "mixed_with_query": 0, "temperature": 0.07}),
        ("mochi", {"warmup_epochs": 9, "temperature": 0.07}),
        ("feature-transformation", {"extrapolation": None, "interpolation": None}),
    ):
        plain, objective = made("moco", queue=12), made(name, queue=12, **fields)
        for pairs in (first, second):
            assert_same(outcome(objective, pairs), outcome(plain, pairs))


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_harder_positives_and_more_negatives_cost_more(seed: int) -> None:
    """Extrapolated positives score less; mixtures are further negatives."""
    first, second = batch(seed, names=TEACHERS), batch(seed + 1, names=TEACHERS)
    losses = []
    for name, fields in (
        ("moco", {}),
        ("feature-transformation", {"interpolation": None}),
        ("mochi", {"temperature": 0.07, "hardest": 4, "mixed": 5, "mixed_with_query": 5}),
    ):
        objective = made(name, queue=12, **fields)
        outcome(objective, first)
        losses.append(outcome(objective, second)[0])
    assert losses[1] > losses[0]
    assert losses[2] > losses[0]


def test_a_mined_negative_of_weight_two_is_two_of_them() -> None:
    pairs = batch(2)
    rows = unit_rows(9, 3)
    owner = torch.tensor([0, 3, 3])
    weighted = Extra(rows, owner, weight=torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    repeated = Extra(torch.cat([rows[:1], rows[:2]]), torch.tensor([0, 0, 3]))
    once, twice = (
        outcome(made("mined-negatives"), replace(pairs, extra={"negatives": e})) for e in (weighted, repeated)
    )
    assert_same(once, twice)


def test_noise_moves_towards_the_anchors() -> None:
    """Anchors that lie close together leave room; noise that was moved fills it, which costs."""
    pairs = batch(5, names=TEACHERS, spread=0.2)
    still, moved = (
        outcome(made("dclr", noise=20, noise_steps=steps, noise_rate=0.5, threshold=2.0), pairs)[0] for steps in (0, 4)
    )
    assert moved > still


def test_identical_scores_are_all_false_negatives() -> None:
    """Ties with the k-th score count: nobody is singled out by its place in the batch."""
    rows = torch.eye(5, dtype=torch.float64)[[0, 0, 0, 0]]
    pairs = Pairs({"a": rows.clone().requires_grad_(), "b": rows.clone().requires_grad_()})
    assert outcome(made("false-negative-elimination", k=1), pairs)[0] == pytest.approx(0, abs=1e-12)


def test_a_pair_with_the_loss_of_a_wrong_one_loses_its_weight() -> None:
    """Two wrong pairs of twelve, in the first epoch all trusted; in the next the mixture has found them."""
    objective = made("noise-posterior", temperature=0.2)
    a = unit_rows(0, 12)
    b = a.clone()
    b[[2, 7]] = a[[7, 2]]
    b = b + 0.05 * unit_rows(3, 12)
    ids = torch.stack([torch.arange(12), torch.arange(12)], 1)
    grads = []
    for epoch in range(2):
        views = {"a": a.clone().requires_grad_(), "b": b.clone().requires_grad_()}
        grads.append(outcome(objective, Pairs(views, ids=ids, clock=Clock(epoch, 2, epoch, 2)))[1][0].norm(dim=1))
    assert (grads[1] < 0.2 * grads[0])[[2, 7]].all()
    assert grads[1].sum() < 0.5 * grads[0].sum()


def test_history_is_by_sample_not_by_place() -> None:
    """The same samples in another order: the same loss."""
    order = torch.tensor([3, 0, 2, 1, 7, 6, 5, 4])
    losses = []
    for moved in (False, True):
        objective = made("bad-pair-mining", low=0.0, high=0.0)
        for epoch in range(2):
            pairs = batch(epoch, clock=Clock(epoch, 2, epoch, 2))
            assert pairs.ids is not None
            if moved and epoch:
                pairs = Pairs({k: v[order] for k, v in pairs.views.items()}, ids=pairs.ids[order], clock=pairs.clock)
            loss = outcome(objective, pairs)[0]
        losses.append(loss)
    torch.testing.assert_close(*losses)


def test_settings_that_say_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of threshold, k and label"):
        made("false-negative-elimination")
