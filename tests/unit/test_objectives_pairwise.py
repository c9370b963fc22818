"""Pairwise and graded objectives: limits in which one becomes another, and finite numbers at the edges.

On one process in float64; that many workers compute the same is the walk's business (`tests/distributed/test_walk.py`).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.errors import DataError
from cl.objectives import OBJECTIVES, ObjectiveConfig, build_objective
from cl.objectives.pairwise.margin import angular, multiplicative
from cl.pairs import Extra, Pairs

DIMENSIONS = 6
seeds = st.integers(0, 2**16)
few = settings(max_examples=15, deadline=None)


def batch(seed: int, count: int = 7, dtype: torch.dtype = torch.float64, **changes: Any) -> Pairs:
    """Random pairs with everything that objectives of these families ask for."""
    g = torch.Generator().manual_seed(seed)
    names = ("a", "b", "c", "a_teacher", "b_teacher", "mined")
    drawn = {n: normalize(torch.randn(count, DIMENSIONS, generator=g, dtype=dtype), dim=1) for n in names}
    views = {n: drawn[n].requires_grad_(not n.endswith("teacher")) for n in ("a", "b")}
    labels = {
        "class": torch.randint(0, 3, (count,), generator=g),
        "score": torch.randn(count, generator=g, dtype=dtype),
        "vector": torch.randn(count, 3, generator=g, dtype=dtype),
        "time": torch.tensor([2, 5]).repeat(count, 1),
    }
    fields: dict[str, Any] = {
        "views": views,
        "labels": labels,
        "extra": {"mined": Extra(drawn["mined"].requires_grad_(), torch.arange(count))},
        "targets": {"soft": torch.rand(count, count, generator=g, dtype=dtype)},
    }
    return Pairs(**{**fields, **changes})


def loss_of(pairs: Pairs, name: str, **config: Any) -> Tensor:
    objective = build_objective(ObjectiveConfig.model_validate({"name": name, **config}), DIMENSIONS)
    return objective.to(pairs.dtype)(pairs, Workers()).loss


def slopes_of(pairs: Pairs, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(pairs.views.values()), allow_unused=True, materialize_grads=True))


def assert_reduces(pairs: Pairs, name: str, config: dict[str, Any], to: str, other: dict[str, Any]) -> None:
    """Both objectives have the same loss, and along the sphere the same gradients."""
    first, second = loss_of(pairs, name, **config), loss_of(pairs, to, **other)
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-8)
    slopes = zip(pairs.views.values(), slopes_of(pairs, first), slopes_of(pairs, second), strict=True)
    for x, *both in slopes:
        slope, expected = (g - (g * x).sum(1, keepdim=True) * x for g in both)
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)


SUPREMIX_IS = {"temperature": 0.3}
MIXTURE_OF_ONE = [{"power": 1.0, "temperature": 0.6}]
REDUCTIONS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("simcse", {"temperature": 0.1}, "infonce", {"temperature": 0.1, "direction": "forward"}),
    ("promcse", {"hinge_weight": 0.0}, "simcse", {}),
    ("promcse", {"hinge_weight": 0.0, "extra": ["mined"]}, "simcse", {"extra": ["mined"]}),
    ("dclw", {"sigma": 1e9, "same_side": False, "temperature": 0.07}, "dcl", {}),
    ("dclw", {"sigma": 1e9}, "dcl", {"same_side": True, "temperature": 0.1}),
    ("supremix", {"label": "class", "mixtures": 0, "mix_negatives": False, "magnify": False}, "supcon", SUPREMIX_IS),
    ("clusterns", {"clusters": 3}, "infonce", {"direction": "forward", "temperature": 0.05}),
    ("additive-margin", {"margin": 0.0}, "infonce", {}),
    ("additive-margin", {"margin": 0.0, "direction": "forward"}, "infonce", {"direction": "forward"}),
    ("angular-margin", {"margin": 0.0}, "infonce", {}),
    ("multiplicative-margin", {"margin": 1.0}, "infonce", {}),
    ("ntxent-am", {"margin": 0.0}, "ntxent", {}),
    # |x - y|^2 / (2 tau) and -<x, y> / tau differ by a constant on the sphere.
    ("kernel-infonce", {"kernels": MIXTURE_OF_ONE}, "ntxent", {"temperature": 0.3}),
    ("kernel-infonce", {"kernels": MIXTURE_OF_ONE, "concatenate": True}, "ntxent", {"temperature": 0.3}),
    ("kernel-infonce", {"kernels": MIXTURE_OF_ONE * 2}, "kernel-infonce", {"kernels": MIXTURE_OF_ONE}),
    ("cpc", {"temperature": 0.2}, "infonce", {"temperature": 0.2, "direction": "forward"}),
    ("triplet", {"distance": "cosine", "margin": 0.2}, "vse++", {}),
    ("soft-targets", {"own_share": 1.0}, "infonce", {}),
    ("soft-labels", {"own_share": 1.0}, "infonce", {}),
    ("y-aware", {"sigma": 1e-4}, "infonce", {}),
    ("listnet", {"own_share": 1.0}, "infonce", {}),
    ("gcl", {"weight": "constant"}, "infonce", {}),
    ("ascl", {"neighbours": 0.0}, "infonce", {"temperature": 0.1, "direction": "forward"}),
    ("i-con", {}, "infonce", {}),
    ("i-con", {"q": "gaussian"}, "infonce", {}),
    ("i-con", {"q": "student-t", "degrees": 1e12}, "infonce", {}),
    ("i-con", {"same_side": True}, "ntxent", {}),
    ("i-con", {"p": "targets"}, "soft-targets", {}),
]


@pytest.mark.parametrize(("name", "config", "to", "other"), REDUCTIONS, ids=lambda value: str(value)[:40])
@given(seed=seeds)
@few
def test_limits(name: str, config: dict[str, Any], to: str, other: dict[str, Any], seed: int) -> None:
    pairs = batch(seed)
    if name == "triplet":  # a mean over both directions, not their sum
        assert float(2 * loss_of(pairs, name, **config).detach()) == pytest.approx(
            float(loss_of(pairs, to, **other).detach())
        )
    else:
        assert_reduces(pairs, name, config, to, other)


@given(seed=seeds)
@few
def test_macl_has_the_gradient_of_dcl_at_its_temperature(seed: int) -> None:
    pairs = batch(seed)
    alignment = float((pairs.views["a"] * pairs.views["b"]).sum(1).mean().detach())
    macl = loss_of(pairs, "macl", temperature=0.2)
    dcl = loss_of(pairs, "dcl", temperature=0.2 * (1 + 0.5 * alignment), learn_temperature=False)
    for slope, expected in zip(slopes_of(pairs, macl), slopes_of(pairs, dcl), strict=True):
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)


@given(seed=seeds)
@few
def test_macl_loss_is_at_least_infonce(seed: int) -> None:
    pairs = batch(seed)
    plain = loss_of(pairs, "infonce", temperature=0.2)
    assert loss_of(pairs, "macl", temperature=0.2, alpha=0.0) >= plain - 1e-6


@given(seed=seeds)
@few
def test_cacr_without_weights_is_mean_distance_of_pairs_minus_mean_distance_of_others(seed: int) -> None:
    pairs = batch(seed)
    distance = torch.cdist(pairs.views["a"], pairs.views["b"]).square()
    others = distance[~torch.eye(len(pairs), dtype=torch.bool)].mean()
    loss = loss_of(pairs, "cacr", t_positive=0.0, t_negative=0.0)
    torch.testing.assert_close(loss, distance.diagonal().mean() - others)


@given(seed=seeds)
@few
def test_cloob_with_a_sharp_memory_is_decoupled_contrast(seed: int) -> None:
    """The memory gives each stored pattern itself; the other modality retrieves its nearest pattern."""
    pairs = batch(seed)
    identical = Pairs({"a": pairs.views["a"], "b": pairs.views["a"].detach().clone().requires_grad_()})
    cloob = loss_of(identical, "cloob", beta=1e4, temperature=0.1)
    torch.testing.assert_close(cloob, 2 * loss_of(identical, "dcl", temperature=0.1), rtol=1e-6, atol=1e-6)


@given(seed=seeds)
@few
def test_decoupled_uniformity_with_a_narrow_kernel_is_that_without(seed: int) -> None:
    """Samples that nothing connects keep their own centre, up to the ridge."""
    pairs = batch(seed)
    narrow = loss_of(pairs, "decoupled-uniformity", label="vector", bandwidth=1e-3, ridge=1e-12)
    torch.testing.assert_close(narrow, loss_of(pairs, "decoupled-uniformity"), rtol=1e-8, atol=1e-8)


@given(seed=seeds)
@few
def test_orthonormal_pairs_minimise_the_spectral_loss(seed: int) -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).double()).Q
    best = loss_of(Pairs({"a": basis, "b": basis}), "spectral")
    assert float(best) == pytest.approx(-2.0)
    pairs = batch(seed, count=6)
    assert loss_of(pairs, "spectral") >= best


@given(seed=seeds, margin=st.floats(0, 1))
@few
def test_a_larger_margin_costs_more(seed: int, margin: float) -> None:
    pairs = batch(seed)
    for name in ("additive-margin", "angular-margin", "ntxent-am", "triplet", "hinge", "vse++"):
        assert loss_of(pairs, name, margin=margin + 0.2) >= loss_of(pairs, name, margin=margin) - 1e-9


@given(seed=seeds)
@few
def test_angular_and_multiplicative_margins_fall_with_the_angle(seed: int) -> None:
    theta = torch.linspace(0.01, math.pi - 0.01, 400, dtype=torch.float64)
    for function, size in ((angular, 0.1 + seed % 10 / 10), (multiplicative, 1 + seed % 7 / 2)):
        assert bool((function(theta.cos(), size).diff() < 1e-9).all())


@given(seed=seeds)
@few
def test_cosent_counts_inversions_at_a_low_temperature(seed: int) -> None:
    """tau log(1 + sum exp(x / tau)) tends to the largest difference of an inverted pair."""
    pairs = batch(seed)
    score, label = (pairs.views["a"] * pairs.views["b"]).sum(1), pairs.labels["score"]
    worst = (score[None] - score[:, None]).masked_fill(label[:, None] <= label, -torch.inf).max().clamp_min(0)
    loss = loss_of(pairs, "cosent", temperature=0.01)
    torch.testing.assert_close(0.01 * loss, worst, rtol=0, atol=0.06)


@given(seed=seeds)
@few
def test_listmle_of_one_rank_is_cross_entropy_of_the_best(seed: int) -> None:
    pairs = batch(seed)
    logits = pairs.views["a"] @ pairs.views["b"].T / 0.1
    best = pairs.targets["soft"].argmax(1)
    expected = torch.nn.functional.cross_entropy(logits, best)
    torch.testing.assert_close(loss_of(pairs, "listmle", k=1, temperature=0.1), expected, rtol=1e-6, atol=1e-6)


@given(seed=seeds)
@few
def test_sorted_groups_cost_groco_nothing(seed: int) -> None:
    """Pairs in the same place and strangers on the other axes are in order, and a steep network sees it."""
    basis = torch.eye(6, dtype=torch.float64)
    loss = loss_of(Pairs({"a": basis, "b": basis}), "groco", negatives=3, steepness=1e6)
    # Negatives that are equal may be swapped at will; positives are not among them.
    assert float(loss) < 1e-3
    assert loss_of(batch(seed), "groco", negatives=3, steepness=1e6) > loss


FAMILY = [
    e.name for e in OBJECTIVES.entries() if ".pairwise." in e.value.__module__ or ".graded." in e.value.__module__
]
SPECIAL: dict[str, dict[str, Any]] = {
    "cpc": {},
    "brownian-bridge": {},
    "groco": {"negatives": 2},
    "decoupled-uniformity": {"label": "vector"},
}


def for_objective(name: str, seed: int, dtype: torch.dtype, change: Any = lambda x: x) -> Pairs:
    pairs = batch(seed, dtype=dtype)
    views = {n: change(x.detach()).requires_grad_() for n, x in pairs.views.items()}
    if name == "brownian-bridge":
        views["c"] = views["a"].detach().clone().requires_grad_()
    return batch(seed, dtype=dtype, views=views)


EDGES = {
    "identical": lambda x: x[:1].expand_as(x).clone(),
    "zero": lambda x: torch.zeros_like(x),
    "opposite": lambda x: torch.where(torch.arange(len(x))[:, None] % 2 == 0, x[:1], -x[:1]),
    "one": lambda x: x,
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", FAMILY)
def test_loss_and_gradient_are_finite_at_the_edges(name: str, edge: str) -> None:
    """Equal, zero and opposite embeddings, and a temperature of 1/100, in float32."""
    cold = {"temperature": 0.01} if "temperature" in OBJECTIVES[name].Config.model_fields else {}
    for temperature in ({}, cold):
        pairs = for_objective(name, 3, torch.float32, EDGES[edge])
        loss = loss_of(pairs, name, **{**SPECIAL.get(name, {}), **temperature})
        assert loss.isfinite()
        assert all(slope.isfinite().all() for slope in slopes_of(pairs, loss))


@pytest.mark.parametrize("name", FAMILY)
def test_a_sample_alone_has_a_finite_loss(name: str) -> None:
    """No negatives: whatever has nothing to compare is left out, not infinite."""
    pairs = batch(5, count=1)
    if name == "brownian-bridge":
        pairs = batch(5, count=1, views=dict.fromkeys(("a", "b", "c"), pairs.views["a"]))
    loss = loss_of(pairs, name, **SPECIAL.get(name, {}))
    assert loss.isfinite()
    assert all(slope.isfinite().all() for slope in slopes_of(pairs, loss))


def test_places_outside_of_a_bridge_are_refused() -> None:
    pairs = batch(1)
    three = {**pairs.views, "c": pairs.views["a"]}
    with pytest.raises(DataError, match="outside of 0 < t < T"):
        loss_of(batch(1, views=three, labels={"time": torch.tensor([5, 5]).repeat(7, 1)}), "brownian-bridge")
    with pytest.raises(DataError, match="three views"):
        loss_of(pairs, "brownian-bridge")
    with pytest.raises(DataError, match="horizons"):
        loss_of(pairs, "cpc", horizons=2)
    with pytest.raises(DataError, match="targets 'absent'"):
        loss_of(pairs, "listnet", target="absent")
    with pytest.raises(DataError, match="a_teacher"):
        loss_of(pairs, "i-con", p="kernel")
