"""Objectives of two views beside those of lightly: the same loss, the same gradients, in float64 on one process.

Peers that normalise embeddings do it once more, so gradients are compared with respect to raw points.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DCLLoss,
    DCLWLoss,
    DINOLoss,
    MACLLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
    WMSELoss,
)
from lightly.loss.hypersphere_loss import HypersphereLoss
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.objectives import Objective, ObjectiveConfig, build_objective
from cl.pairs import Pairs

COUNT, WIDTH = 16, 6
Loss = Callable[[Tensor, Tensor], Tensor]


def objective(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return build_objective(ObjectiveConfig.model_validate({"name": name, **fields}), WIDTH).double()


def points(seed: int = 7, views: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(COUNT, WIDTH, generator=generator, dtype=torch.float64)
    return [common + 0.7 * torch.randn(COUNT, WIDTH, generator=generator, dtype=torch.float64) for _ in range(views)]


def on_sphere(of: Objective) -> Loss:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        return of(Pairs({"a": normalize(a, dim=1), "b": normalize(b, dim=1)}), Workers()).loss

    return loss


def compare(ours: Loss, theirs: Loss, bound: float = 1e-9) -> None:
    found = []
    for loss in (ours, theirs):
        views = [view.clone().requires_grad_() for view in points()]
        value = loss(*views)
        found.append((value.detach().squeeze(), *torch.autograd.grad(value.squeeze(), views)))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=bound, atol=bound)


FIXED = {"learn_temperature": False, "temperature": 0.5}  # 0.5 is exact in float32 and in its logarithm's inverse
PAIRS = [
    ("dcl", {**FIXED, "same_side": True}, DCLLoss(0.5)),
    ("dclw", {**FIXED, "sigma": 0.4}, DCLWLoss(0.5, sigma=0.4)),
    ("ntxent", FIXED, NTXentLoss(0.5)),
    # lightly adds 1e-8 to 1 - P before it divides by it.
    ("macl", {**FIXED, "same_side": True, "alpha": 0.3, "expected_alignment": 0.1}, MACLLoss(0.5, alpha=0.3, A_0=0.1)),
    ("alignment-uniformity", {"t": 1.5, "uniform_weight": 0.8}, HypersphereLoss(t=1.5, lam=0.8)),
]


@pytest.mark.filterwarnings("ignore:To copy construct")  # the weights of DCLWLoss
@pytest.mark.parametrize(("name", "fields", "peer"), PAIRS, ids=[name for name, _, _ in PAIRS])
def test_pairs_on_the_sphere(name: str, fields: dict[str, Any], peer: nn.Module) -> None:
    compare(on_sphere(objective(name, **fields)), peer, bound=1e-6)


def test_barlow_twins() -> None:
    compare(on_sphere(objective("barlow-twins")), lambda a, b: BarlowTwinsLoss(0.0051)(unit(a), unit(b)))


def test_vicreg() -> None:
    compare(on_sphere(objective("vicreg")), lambda a, b: VICRegLoss()(unit(a), unit(b)))


def test_whitening_of_each_view() -> None:
    peer = WMSELoss(WIDTH, eps=0.01, w_size=COUNT).double()
    compare(on_sphere(objective("w-mse", eps=0.01)), lambda a, b: peer(torch.cat([unit(a), unit(b)])))


def test_simsiam() -> None:
    ours, criterion = objective("simsiam", projector=[5], predictor=[4]), NegativeCosineSimilarity()
    weight = torch.ones(COUNT, dtype=torch.float64)

    def theirs(a: Tensor, b: Tensor) -> Tensor:
        z = [ours.projector(unit(view), weight, Workers()) for view in (a, b)]
        p = [ours.predictor(view, weight, Workers()) for view in z]
        return (criterion(p[0], z[1].detach()) + criterion(p[1], z[0].detach())) / 2

    compare(on_sphere(ours), theirs)


def test_swav_with_a_local_crop() -> None:
    ours = objective("swav", prototypes=9, epsilon=0.2)
    views = [normalize(view, dim=1) for view in points(views=3)]
    scores = [view @ normalize(ours.prototypes, dim=1).T for view in views]
    peer = SwaVLoss(sinkhorn_epsilon=0.2)(scores[:2], scores[2:])
    loss = ours(Pairs(dict(zip("abc", views, strict=True))), Workers()).loss
    torch.testing.assert_close(loss, peer[0], rtol=1e-9, atol=1e-9)
    slopes = [torch.autograd.grad(value, ours.prototypes)[0] for value in (loss, peer)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)


def test_dino_over_two_steps() -> None:
    """The centre of the second step comes from the first."""
    fields = {"hidden": 5, "bottleneck": 4, "prototypes": 7, "momentum": 1.0, "teacher_temperature": 0.25}
    ours, peer = objective("dino", **fields), DINOLoss(7, teacher_temp=0.25).double()
    for step in range(2):
        a, b, c, *teachers = (normalize(view, dim=1) for view in points(seed=step, views=5))
        views = {"a": a, "b": b, "c": c, "a_teacher": teachers[0], "b_teacher": teachers[1]}
        loss = ours(Pairs(views), Workers()).loss
        expected = peer([ours.slow(view) for view in teachers], [ours.head(view) for view in (a, b, c)])
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


def moments_of_moco(queue: int, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """The losses of both over some steps."""
    ours = objective("moco", queue=queue, temperature=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = NTXentLoss(0.5, memory_bank_size=(queue, WIDTH)).double()
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in range(steps):
        query, key = (normalize(view, dim=1) for view in points(seed=step))
        views = {"a": query.requires_grad_(), "b": key, "a_teacher": query.detach(), "b_teacher": key}
        found[0].append(ours(Pairs(views), Workers()).loss.detach())
        found[1].append(peer(query, key).detach())
    return found


def test_moco_once_the_bank_is_full() -> None:
    """lightly's bank begins with random vectors as negatives, ours empty: from the second step on both hold the keys
    of the last.
    """
    ours, theirs = moments_of_moco(COUNT, 3)
    assert float((ours[0] - theirs[0]).abs()) > 0.1
    torch.testing.assert_close(torch.stack(ours[1:]), torch.stack(theirs[1:]), rtol=1e-6, atol=1e-6)


def test_lightly_loses_keys_where_its_bank_is_no_multiple_of_the_batch() -> None:
    """A bank of 24 takes 16 keys, then only 8 of the next 16, and begins anew: it is never the last 24 keys."""
    ours, theirs = moments_of_moco(24, 4)
    bank = [normalize(view, dim=1) for view in (points(seed=step)[1] for step in range(3))]
    query, key = (normalize(view, dim=1) for view in points(seed=3))

    def loss(negatives: Tensor) -> Tensor:
        logits = 2 * torch.cat([(query * key).sum(1, keepdim=True), query @ negatives.T], 1)
        return (logits.logsumexp(1) - logits[:, 0]).mean()

    torch.testing.assert_close(ours[3], loss(torch.cat(bank)[-24:]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(theirs[3], loss(torch.cat([bank[2], bank[1][:8]])), rtol=1e-6, atol=1e-6)
