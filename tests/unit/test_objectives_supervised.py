"""What supervised objectives become in their limits, and that they stay finite where embeddings collapse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from cl.engine.collectives import Workers
from cl.errors import ConfigError, DataError
from cl.objectives import Objective, ObjectiveConfig, build_objective
from cl.pairs import Extra, Pairs

FEW = settings(max_examples=15, deadline=None)
SEEDS = st.integers(0, 10_000)
COUNTS = st.integers(2, 9)
WIDTH = 5


def objective(name: str, **fields: Any) -> Objective:
    torch.manual_seed(0)
    return build_objective(ObjectiveConfig.model_validate({"name": name, **fields}), WIDTH).double()


def views(seed: int, count: int, names: str = "ab", unit: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    raw = {name: torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) for name in names}
    return {name: normalize(x, dim=1) if unit else x for name, x in raw.items()}


def classes(seed: int, count: int, number: int = 3) -> Tensor:
    return torch.randint(0, number, (count,), generator=torch.Generator().manual_seed(seed))


def loss(of: Objective, pairs: Pairs) -> float:
    return float(of(pairs, Workers()).loss.detach())


@FEW
@given(SEEDS, COUNTS, st.sampled_from(["unique", "unknown"]))
def test_without_company_in_its_class_everything_is_ntxent(seed: int, count: int, kind: str) -> None:
    label = torch.arange(count) if kind == "unique" else torch.full((count,), -1)
    pairs = Pairs(views(seed, count), labels={"class": label, "levels": label[:, None]})
    expected = loss(objective("ntxent", temperature=0.1), pairs)
    for other in (
        objective("supcon"),
        objective("supcon", form="in"),
        objective("sincere"),
        objective("kcl"),
        objective("himulcon", weights=[1.0]),
        objective("rince"),
    ):
        assert loss(other, pairs) == pytest.approx(expected, rel=1e-12)


@FEW
@given(SEEDS, COUNTS)
def test_supcon_is_the_limit_of_its_kin(seed: int, count: int) -> None:
    """One level, one tag a sample, or as many positives drawn as there are."""
    label = classes(seed, count)
    tags = torch.nn.functional.one_hot(label, 3).double()
    pairs = Pairs(views(seed, count), labels={"class": label, "levels": label[:, None], "tags": tags})
    expected = loss(objective("supcon"), pairs)
    for other in (
        objective("himulcon", weights=[1.0]),
        objective("multi-label"),
        objective("multi-label", overlap="containment", threshold=1.0),
        objective("kcl", k=100),
    ):
        assert loss(other, pairs) == pytest.approx(expected, rel=1e-12)
    assert loss(objective("kcl", k=0), pairs) == pytest.approx(
        loss(objective("ntxent", temperature=0.1), pairs), rel=1e-12
    )


@FEW
@given(SEEDS, COUNTS)
def test_the_sum_inside_of_the_log_without_the_count(seed: int, count: int) -> None:
    """RINCE of one level and soft nearest neighbours are SupCon `in` plus the mean log of the number of positives."""
    label = classes(seed, count)
    pairs = Pairs(views(seed, count), labels={"class": label, "levels": label[:, None]})
    number = 2 * (label[:, None] == label).sum(1) - 1
    expected = loss(objective("supcon", form="in"), pairs) - float(number.double().log().mean())
    assert loss(objective("rince"), pairs) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    near = objective("soft-nearest-neighbour", temperature=0.2)
    assert loss(near, pairs) == pytest.approx(expected, rel=1e-6, abs=1e-6)  # the temperature is stored in float32


@FEW
@given(SEEDS, st.integers(4, 9))
def test_neighbours_are_near_by_distance_not_by_angle(seed: int, count: int) -> None:
    """Embeddings of any length: the formula on one view."""
    z, label = views(seed, count, "a", unit=False)["a"], torch.arange(count) % 2
    near = (-(torch.cdist(z, z).square())).exp().masked_fill(torch.eye(count, dtype=torch.bool), 0)
    expected = -((near * (label[:, None] == label)).sum(1) / near.sum(1)).log().mean()
    of = objective("soft-nearest-neighbour", temperature=1.0)
    assert loss(of, Pairs({"a": z}, labels={"class": label})) == pytest.approx(float(expected), rel=1e-9)


@FEW
@given(SEEDS, COUNTS, st.sampled_from(["himulcon", "rince"]))
def test_names_of_species_may_come_again_in_another_family(seed: int, count: int, name: str) -> None:
    """A level counts as equal only where all above it are."""
    family, species = classes(seed, count), classes(seed + 1, count)
    numbered, again = torch.stack([family, 3 * family + species], 1), torch.stack([family, species], 1)
    both = [Pairs(views(seed, count), labels={"levels": levels}) for levels in (numbered, again)]
    assert loss(objective(name), both[0]) == pytest.approx(loss(objective(name), both[1]), rel=1e-12)


@FEW
@given(SEEDS, COUNTS)
def test_one_positive_is_infonce(seed: int, count: int) -> None:
    pairs = Pairs(views(seed, count), labels={"class": torch.arange(count)})
    expected = loss(objective("infonce"), pairs)
    assert loss(objective("multi-positive"), pairs) == pytest.approx(expected, rel=1e-12)
    assert loss(objective("unicl"), pairs) == pytest.approx(expected, rel=1e-12)
    forward = loss(objective("infonce", direction="forward"), pairs)
    assert loss(objective("multi-positive", direction="forward"), pairs) == pytest.approx(forward, rel=1e-12)
    plain = objective("infonce", direction="forward", temperature=1.0)
    assert loss(objective("npair", l2=0.0), pairs) == pytest.approx(loss(plain, pairs), rel=1e-12)


@FEW
@given(SEEDS, COUNTS)
def test_a_text_counts_the_same_as_a_view_or_as_a_further_positive(seed: int, count: int) -> None:
    both = views(seed, count, "abc")
    as_views = loss(objective("multi-positive"), Pairs(both))
    extra = {"more": Extra(both.pop("c"), torch.arange(count), "positive")}
    as_extra = loss(objective("multi-positive", extra=["more"]), Pairs(both, extra=extra))
    assert as_extra == pytest.approx(as_views, rel=1e-12)


@FEW
@given(SEEDS, COUNTS)
def test_proxies_of_one_a_class_are_a_cosine_classifier(seed: int, count: int) -> None:
    label = classes(seed, count)
    pairs = Pairs(views(seed, count, "a"), labels={"class": label})
    proxies = objective("proxy-nca", classes=4, denominator="all", temperature=1.0)
    vectors = normalize(proxies.get_parameter("proxies.vectors"), dim=1)
    expected = cross_entropy(2 * pairs.views["a"] @ vectors.T, label)
    assert loss(proxies, pairs) == pytest.approx(float(expected.detach()), rel=1e-12)


@FEW
@given(SEEDS, COUNTS)
def test_paco_without_samples_is_a_classifier_over_centres_and_batch(seed: int, count: int) -> None:
    """alpha = 0: the own centre is the one positive, samples and all centres the candidates."""
    label = classes(seed, count)
    pairs = Pairs(views(seed, count, "a"), labels={"class": label})
    paco = objective("paco", classes=3, alpha=0.0, temperature=1.0)
    z, centres = pairs.views["a"], paco.get_parameter("prototypes.vectors")
    logits = torch.cat([z @ centres.T, (z @ z.T).masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)], 1)
    assert loss(paco, pairs) == pytest.approx(float(cross_entropy(logits, label).detach()), rel=1e-12)


@FEW
@given(SEEDS, st.integers(2, 6))
def test_a_frequent_class_repels_no_more_than_a_rare_one(seed: int, times: int) -> None:
    """Balanced contrast: copies of a class's samples do not change what an anchor of another class loses."""
    own, strange = views(seed, 1, "ab"), views(seed + 1, 1, "ab")

    def anchor_loss(copies: int) -> float:
        both = {name: torch.cat([own[name], strange[name].expand(copies, WIDTH)]) for name in own}
        label = torch.tensor([0] + [1] * copies)
        weight = torch.tensor([1.0] + [1e-9] * copies, dtype=torch.float64)
        # A prototype that equals what it stands for, so that the class mean is the same however many there are.
        bcl = objective("bcl", classes=2)
        bcl.get_parameter("prototypes.vectors").data[1] = strange["a"][0]
        both["b"] = both["b"].clone()
        both["b"][1:] = both["a"][1:]
        return loss(bcl, Pairs(both, labels={"class": label}, weight=weight))

    assert anchor_loss(times) == pytest.approx(anchor_loss(1), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("circle", {"gamma": 1000.0}),
        ("multi-similarity", {"alpha": 500.0, "beta": 1000.0}),
        ("npair", {}),
        ("proxy-anchor", {"classes": 3, "alpha": 1000.0}),
    ],
)
@pytest.mark.parametrize("kind", ["random", "identical", "zero"])
def test_no_nan_where_embeddings_collapse(name: str, fields: dict[str, Any], kind: str) -> None:
    """float32, sharpness far above any published one."""
    both = {}
    for view, value in views(0, 6).items():
        flat = torch.ones(6, WIDTH) / WIDTH**0.5 if kind == "identical" else value.float()
        both[view] = (flat * (kind != "zero")).requires_grad_()
    of = objective(name, **fields).float()
    out = of(Pairs(both, labels={"class": classes(0, 6)}), Workers()).loss
    assert out.isfinite()
    out.backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in both.values())


def test_margin_and_mining_limits() -> None:
    """At their optimum pairs carry no slope in the circle loss (each counts 1), and none is mined."""
    label = torch.tensor([0, 0, 1, 1])
    apart = torch.eye(WIDTH, dtype=torch.float64)[[0, 0, 1, 1]]
    pairs = Pairs({"a": torch.where(label[:, None] == 1, -apart.roll(-1, 1), apart)}, labels={"class": label})
    assert loss(objective("circle", margin=0.0), pairs) == pytest.approx(float(torch.log(torch.tensor(3.0))), rel=1e-6)
    assert loss(objective("multi-similarity"), pairs) == 0


def test_errors_say_what_was_expected() -> None:
    both = views(0, 3)
    with pytest.raises(DataError, match="needs the label 'class'"):
        objective("supcon")(Pairs(both), Workers())
    with pytest.raises(DataError, match=r"expected \[samples, levels\]"):
        objective("himulcon")(Pairs(both, labels={"levels": torch.arange(3)}), Workers())
    pairs = Pairs(both, labels={"levels": torch.zeros(3, 2, dtype=torch.int64)})
    with pytest.raises(DataError, match="3 weights of levels"):
        objective("himulcon", weights=[1.0, 1.0, 1.0])(pairs, Workers())
    with pytest.raises(DataError, match="holds class 5, but there are 4 classes"):
        objective("paco", classes=4)(Pairs(both, labels={"class": torch.tensor([0, 5, 1])}), Workers())
    with pytest.raises(ConfigError, match="classes"):
        objective("proxy-nca")
    with pytest.raises(DataError, match="holds classes from 0 to 9; expected 0 to 3"):
        objective("gated-subspaces", classes=4)(Pairs(both, labels={"class": torch.tensor([0, 9, 1])}), Workers())


@FEW
@given(SEEDS, COUNTS)
def test_open_gates_are_infonce(seed: int, count: int) -> None:
    gated = objective("gated-subspaces", classes=3)
    gated.get_parameter("gate.2.weight").data.zero_()
    gated.get_parameter("gate.2.bias").data.fill_(100.0)
    pairs = Pairs(views(seed, count), labels={"class": classes(seed, count)})
    assert loss(gated, pairs) == pytest.approx(loss(objective("infonce"), pairs), rel=1e-12)


@FEW
@given(SEEDS, COUNTS)
def test_without_a_margin_it_is_the_normalised_softmax(seed: int, count: int) -> None:
    label = classes(seed, count)
    pairs = Pairs(views(seed, count, "a"), labels={"class": label})
    for name in ("cosface", "arcface"):
        of = objective(name, classes=4, scale=7.0, margin=0.0)
        vectors = normalize(of.get_parameter("proxies.vectors"), dim=1)
        expected = float(cross_entropy(7 * pairs.views["a"] @ vectors.T, label).detach())
        assert loss(of, pairs) == pytest.approx(expected, rel=1e-12)
        assert loss(objective(name, classes=4, scale=7.0, margin=0.2), pairs) > expected
