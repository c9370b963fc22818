"""Loss and gradients beside pytorch-metric-learning's, which has one view and one process, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import DotProductSimilarity
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.objectives import Objective, ObjectiveConfig, build_objective
from cl.pairs import Pairs

COUNT, WIDTH, CLASSES = 12, 5, 4
SEEDS = pytest.mark.parametrize("seed", range(3))


def objective(name: str, **fields: Any) -> Objective:
    torch.manual_seed(0)
    made = build_objective(ObjectiveConfig.model_validate({"name": name, **fields}), WIDTH).double()
    if "temperature" in fields:  # was rounded to float32
        made.get_parameter("temperature.log_scale").data.fill_(-math.log(fields["temperature"]))
    return made


def batch(seed: int, lonely: bool = False) -> tuple[Tensor, Tensor]:
    """Raw embeddings and classes, each with several samples; `lonely` adds a class of one."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(COUNT, WIDTH, generator=generator, dtype=torch.float64)
    label = (torch.arange(COUNT) % 3)[torch.randperm(COUNT, generator=generator)]
    if lonely:
        label[0] = 3
    return points, label


def compare(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], points: Tensor) -> None:
    """Both as functions of raw embeddings, which theirs normalise by themselves."""
    mine, other = points.clone().requires_grad_(), points.clone().requires_grad_()
    first, second = ours(mine), theirs(other)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)
    first.backward()
    second.backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-11)


def on_sphere(of: Objective, label: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(points: Tensor) -> Tensor:
        return of(Pairs({"a": normalize(points, dim=1)}, labels={"class": label}), Workers()).loss

    return loss


@SEEDS
@pytest.mark.parametrize("lonely", [False, True])
def test_supcon(seed: int, lonely: bool) -> None:
    """An anchor that is alone in its class has no loss and is not counted, here and there."""
    points, label = batch(seed, lonely)
    peer = losses.SupConLoss(temperature=0.25)
    compare(on_sphere(objective("supcon", temperature=0.25), label), lambda x: peer(x, label), points)


@SEEDS
def test_supcon_of_two_views(seed: int) -> None:
    """Their way to two views: the embeddings stacked, the labels repeated."""
    label = batch(seed)[1]
    points = torch.cat([batch(seed)[0], batch(seed + 100)[0]])
    supcon, peer = objective("supcon", temperature=0.25), losses.SupConLoss(temperature=0.25)

    def ours(both: Tensor) -> Tensor:
        a, b = normalize(both, dim=1).chunk(2)
        return supcon(Pairs({"a": a, "b": b}, labels={"class": label}), Workers()).loss

    compare(ours, lambda x: peer(x, label.repeat(2)), points)


@SEEDS
@pytest.mark.parametrize("lonely", [False, True])
def test_soft_nearest_neighbours_are_their_nca_loss(seed: int, lonely: bool) -> None:
    """NCA with a temperature. Theirs writes -inf into the diagonal in place; the mean is over anchors with company."""
    points, label = batch(seed, lonely)
    near, peer = objective("soft-nearest-neighbour", temperature=0.5), losses.NCALoss(softmax_scale=2)
    compare(on_sphere(near, label), lambda x: peer(x, label), points)


@SEEDS
def test_multi_similarity_without_mining(seed: int) -> None:
    points, label = batch(seed, lonely=True)
    peer = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    compare(on_sphere(objective("multi-similarity", epsilon=None), label), lambda x: peer(x, label), points)


@SEEDS
@pytest.mark.parametrize("epsilon", [0.1, 0.5])
def test_multi_similarity_with_mining(seed: int, epsilon: float) -> None:
    points, label = batch(seed)
    peer, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(epsilon=epsilon)
    ours = on_sphere(objective("multi-similarity", epsilon=epsilon), label)
    compare(ours, lambda x: peer(x, label, miner(x, label)), points)


@SEEDS
def test_circle(seed: int) -> None:
    """Theirs averages over anchors with a loss above 0: those that have a positive and a negative."""
    points, label = batch(seed, lonely=True)
    peer = losses.CircleLoss(m=0.3, gamma=20)
    compare(on_sphere(objective("circle", margin=0.3, gamma=20.0), label), lambda x: peer(x, label), points)


@SEEDS
def test_npair(seed: int) -> None:
    """Inner products of raw embeddings; theirs wants one pair a class, so classes are told which."""
    points, label = batch(seed)[0], torch.arange(COUNT // 2)
    peer = losses.NPairsLoss(distance=DotProductSimilarity(normalize_embeddings=False))
    plain = objective("npair", l2=0.0)
    pairs = torch.arange(COUNT // 2), torch.arange(COUNT // 2) + COUNT // 2

    def ours(both: Tensor) -> Tensor:
        a, b = both.chunk(2)
        return plain(Pairs({"a": a, "b": b}, labels={"class": label}), Workers()).loss

    none = torch.empty(0, dtype=torch.int64)
    compare(ours, lambda x: peer(x, label.repeat(2), (*pairs, none, none)), points)


@SEEDS
@pytest.mark.parametrize("kind", ["nca", "anchor"])
def test_proxies(seed: int, kind: str) -> None:
    """The gradient of the proxies too. Their ProxyNCA has own proxies in the denominator (the paper has not)."""
    points, label = batch(seed)
    if kind == "nca":
        peer = losses.ProxyNCALoss(CLASSES, WIDTH, softmax_scale=3)
        ours = objective("proxy-nca", classes=CLASSES, temperature=1 / 3, denominator="all")
    else:
        peer = losses.ProxyAnchorLoss(CLASSES, WIDTH, margin=0.1, alpha=16)
        ours = objective("proxy-anchor", classes=CLASSES, alpha=16.0, delta=0.1)
    vectors = ours.get_parameter("proxies.vectors")
    peer.proxies.data = vectors.detach().clone()
    compare(on_sphere(ours, label), lambda x: peer(x, label), points)
    torch.testing.assert_close(vectors.grad, peer.proxies.grad, rtol=1e-7, atol=1e-9)


@SEEDS
@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_margin_softmax(seed: int, kind: str) -> None:
    """Their angles are in degrees and their class vectors in columns."""
    points, label = batch(seed)
    if kind == "cosface":
        peer = losses.CosFaceLoss(CLASSES, WIDTH, margin=0.3, scale=12)
        ours = objective("cosface", classes=CLASSES, margin=0.3, scale=12.0)
    else:
        peer = losses.ArcFaceLoss(CLASSES, WIDTH, margin=math.degrees(0.7), scale=12)
        ours = objective("arcface", classes=CLASSES, margin=0.7, scale=12.0)
    vectors = ours.get_parameter("proxies.vectors")
    peer.W.data = vectors.detach().T.clone()
    compare(on_sphere(ours, label), lambda x: peer(x, label), points)
    torch.testing.assert_close(vectors.grad, peer.W.grad.T, rtol=1e-7, atol=1e-9)
