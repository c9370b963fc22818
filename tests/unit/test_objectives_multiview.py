"""What objectives for many views become with two, with one token, or in other limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.errors import ConfigError, DataError
from cl.objectives import Objective, ObjectiveConfig, build_objective
from cl.objectives.multiview.gram import adjugate, determinant
from cl.pairs import Pairs

FEW = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 10_000)
COUNTS = st.integers(2, 9)
WIDTH = 5


def objective(name: str, **fields: Any) -> Objective:
    torch.manual_seed(0)
    return build_objective(ObjectiveConfig.model_validate({"name": name, **fields}), WIDTH).double()


def views(seed: int, count: int, names: str = "ab") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: normalize(torch.randn(count, WIDTH, generator=generator, dtype=torch.float64), dim=1) for name in names
    }


def loss(of: Objective, pairs: Pairs) -> float:
    return float(of(pairs, Workers()).loss.detach())


@FEW
@given(SEEDS, COUNTS)
def test_with_two_views(seed: int, count: int) -> None:
    pairs = Pairs(views(seed, count))
    infonce, ntxent = loss(objective("infonce"), pairs), loss(objective("ntxent"), pairs)
    assert loss(objective("pairwise"), pairs) == pytest.approx(infonce, rel=1e-12)
    assert loss(objective("pairwise", graph="core"), pairs) == pytest.approx(infonce, rel=1e-12)
    for kind in ("geometric", "arithmetic", "sufficient"):
        assert loss(objective(f"poly-view-{kind}"), pairs) == pytest.approx(ntxent, rel=1e-12)
    forward = loss(objective("infonce", direction="forward"), pairs)
    assert loss(objective("mil-nce", direction="forward"), pairs) == pytest.approx(forward, rel=1e-12)


@FEW
@given(SEEDS, COUNTS)
def test_pairwise_is_the_mean_of_its_pairs(seed: int, count: int) -> None:
    every = views(seed, count, "abc")
    parts = [loss(objective("infonce", views=pair), Pairs(every)) for pair in (("a", "b"), ("a", "c"), ("b", "c"))]
    assert loss(objective("pairwise"), Pairs(every)) == pytest.approx(sum(parts) / 3, rel=1e-12)
    core = objective("pairwise", graph="core")
    assert loss(core, Pairs(every)) == pytest.approx((parts[0] + parts[1]) / 2, rel=1e-12)
    weighted = objective("pairwise", pairs=[("b", "c")], weights=[2.0])
    assert loss(weighted, Pairs(every)) == pytest.approx(2 * parts[2], rel=1e-12)


@FEW
@given(SEEDS, COUNTS)
def test_the_geometric_mean_is_never_below_the_arithmetic(seed: int, count: int) -> None:
    """Of probabilities the geometric mean is the smaller one, so its loss is the larger (Jensen)."""
    pairs = Pairs(views(seed, count, "abcd"))
    assert loss(objective("poly-view-geometric"), pairs) >= loss(objective("poly-view-arithmetic"), pairs) - 1e-12


@FEW
@given(SEEDS, COUNTS)
def test_one_token_is_infonce(seed: int, count: int) -> None:
    both = views(seed, count)
    tokens = Pairs({name: value[:, None] for name, value in both.items()})
    assert loss(objective("filip"), tokens) == pytest.approx(loss(objective("infonce"), Pairs(both)), rel=1e-12)
    forward = objective("infonce", direction="forward")
    assert loss(objective("colbert"), tokens) == pytest.approx(loss(forward, Pairs(both)), rel=1e-12)


@FEW
@given(SEEDS, COUNTS, st.sampled_from(["filip", "colbert"]))
def test_padding_changes_nothing(seed: int, count: int, name: str) -> None:
    tokens = {view: torch.stack(list(views(seed + k, count, "wxyz").values()), 1) for k, view in enumerate("ab")}
    plain = loss(objective(name), Pairs(tokens))
    padded = {view: torch.cat([value, 9 * value[:, :2]], 1) for view, value in tokens.items()}
    mask = torch.tensor([True] * 4 + [False] * 2).expand(count, 6)
    assert loss(objective(name), Pairs(padded, tokens={"a": mask, "b": mask})) == pytest.approx(plain, rel=1e-12)


@FEW
@given(SEEDS, st.integers(3, 9))
def test_symile_sees_products_alone(seed: int, count: int) -> None:
    """A sign that two modalities share cancels; a modality of ones is no modality."""
    every = views(seed, count, "abc")
    symile = objective("symile")
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    flipped = {"a": every["a"] * sign, "b": every["b"] * sign, "c": every["c"]}
    assert loss(symile, Pairs(flipped)) == pytest.approx(loss(symile, Pairs(every)), rel=1e-12)


@FEW
@given(SEEDS, st.integers(3, 9))
def test_more_shuffles_are_more_negatives(seed: int, count: int) -> None:
    pairs = Pairs(views(seed, count, "abc"))
    assert loss(objective("symile", shuffles=3), pairs) >= loss(objective("symile"), pairs)


@FEW
@given(SEEDS, COUNTS)
def test_a_sample_that_lacks_a_modality_is_left_out_by_symile(seed: int, count: int) -> None:
    """Skipped, it is as if it were not there; the holes may hold anything."""
    every = views(seed, count + 1, "abc")
    there = torch.arange(count + 1) < count
    ids = torch.arange(2 * count + 2).view(-1, 2)
    holed = {**every, "c": every["c"].where(there[:, None], torch.nan)}
    skipped = loss(objective("symile"), Pairs(holed, ids=ids, present={"c": there}))
    without = {name: value[:count] for name, value in every.items()}
    assert skipped == pytest.approx(loss(objective("symile"), Pairs(without, ids=ids[:count])), rel=1e-12)


@FEW
@given(SEEDS, COUNTS)
def test_the_volume_of_two_views_is_the_sine(seed: int, count: int) -> None:
    both = views(seed, count)
    gram = objective("gram", temperature=1.0)
    logits = -(1 - (both["a"] @ both["b"].T).square()).clamp_min(0).sqrt()
    expected = (logits.logsumexp(1) + logits.logsumexp(0)) / 2 - logits.diagonal()
    assert loss(gram, Pairs(both)) == pytest.approx(float(expected.mean()), rel=1e-9)


@FEW
@given(SEEDS, st.integers(1, 4))
def test_determinants_by_expansion(seed: int, size: int) -> None:
    root = torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = root @ root.mT
    spread = matrix.permute(1, 2, 0)
    torch.testing.assert_close(determinant(spread), torch.linalg.det(matrix))
    cofactors = torch.stack([torch.stack(row) for row in adjugate(spread)]).permute(2, 0, 1)
    torch.testing.assert_close(cofactors @ matrix, torch.linalg.det(matrix)[:, None, None] * torch.eye(size).double())


@FEW
@given(SEEDS, st.integers(3, 9))
def test_the_order_of_the_other_modalities_does_not_matter_to_gram(seed: int, count: int) -> None:
    every = views(seed, count, "abcd")
    turned = {name: every[name] for name in "adbc"}
    assert loss(objective("gram"), Pairs(turned)) == pytest.approx(loss(objective("gram"), Pairs(every)), rel=1e-9)


def test_identical_modalities_span_nothing() -> None:
    """The volume has a corner at zero: no loss there but log N, and no NaN in the gradient."""
    one = views(0, 4, "a")["a"][:1].expand(4, WIDTH)
    every = {name: one.clone().requires_grad_() for name in "abc"}
    out = objective("gram")(Pairs(every), Workers()).loss
    assert float(out.detach()) == pytest.approx(float(torch.log(torch.tensor(4.0))), rel=1e-6)
    out.backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in every.values())


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ConfigError, match="name the pairs, one weight each"):
        objective("pairwise", weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="needs the field views"):
        objective("symile", missing="learnt")
    with pytest.raises(DataError, match="Three towers compare three views, but there are 2"):
        objective("three-towers")(Pairs(views(0, 3)), Workers())
    with pytest.raises(DataError, match="late interaction compares tokens"):
        objective("filip")(Pairs(views(0, 3)), Workers())
    with pytest.raises(DataError, match="there is only"):
        objective("mv-dhel")(Pairs(views(0, 3, "a")), Workers())
    with pytest.raises(ConfigError, match="extra"):
        objective("filip", extra=["mined"])
