"""Pairwise and graded objectives beside those of sentence-transformers: the same loss, the same gradients.

Embeddings go straight into the peers' `compute_loss_from_embeddings`, in float64, on one process. The peers normalise
embeddings once more, so gradients are compared along the sphere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    AnglELoss,
    BatchAllTripletLoss,
    BatchHardSoftMarginTripletLoss,
    BatchHardTripletLoss,
    BatchSemiHardTripletLoss,
    CoSENTLoss,
    CosineSimilarityLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.objectives import ObjectiveConfig, build_objective
from cl.pairs import Extra, Pairs

COUNT, DIMENSIONS = 9, 8
Views = dict[str, Tensor]


@pytest.fixture
def views() -> Views:
    generator = torch.Generator().manual_seed(7)
    drawn = {n: torch.randn(COUNT, DIMENSIONS, generator=generator, dtype=torch.float64) for n in ("a", "b", "mined")}
    return {name: normalize(x, dim=1).requires_grad_() for name, x in drawn.items()}


@pytest.fixture
def score() -> Tensor:
    return torch.rand(COUNT, generator=torch.Generator().manual_seed(8), dtype=torch.float64).mul(4).round() / 4


def ours(views: Views, name: str, score: Tensor | None = None, **settings: object) -> Tensor:
    objective = build_objective(ObjectiveConfig.model_validate({"name": name, **settings})).double()
    labels = {} if score is None else {"score": score}
    extra = {"mined": Extra(views["mined"], torch.arange(COUNT))}
    return objective(Pairs({"a": views["a"], "b": views["b"]}, labels=labels, extra=extra), Workers()).loss


def assert_same(loss: Tensor, peer: Tensor, *inputs: Tensor, bound: float = 1e-10) -> None:
    torch.testing.assert_close(loss, peer, rtol=bound, atol=bound)
    slopes, expected = (torch.autograd.grad(value, inputs) for value in (loss, peer))
    for x, slope, other in zip(inputs, slopes, expected, strict=True):
        along, theirs = (g - (g * x).sum(1, keepdim=True) * x for g in (slope, other))
        torch.testing.assert_close(along, theirs, rtol=bound, atol=bound)


def peer(loss: Any, **settings: object) -> Any:
    return loss(torch.nn.Identity(), **settings)


def test_gte_is_ranking_with_joint_directions(views: Views) -> None:
    directions = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    ranking = peer(MultipleNegativesRankingLoss, scale=20.0, directions=directions, partition_mode="joint")
    expected = ranking.compute_loss_from_embeddings([views["a"], views["b"]], None)
    assert_same(ours(views, "gte", temperature=0.05), expected, views["a"], views["b"], bound=1e-6)


def test_simcse_is_ranking_with_hard_negatives(views: Views) -> None:
    ranking = peer(MultipleNegativesRankingLoss, scale=20.0)
    expected = ranking.compute_loss_from_embeddings([views["a"], views["b"], views["mined"]], None)
    loss = ours(views, "simcse", temperature=0.05, extra=["mined"])
    assert_same(loss, expected, views["a"], views["b"], views["mined"], bound=1e-6)


TRIPLETS = [
    (BatchHardTripletLoss, {"margin": 0.3}, {"name": "triplet", "margin": 0.3}),
    (BatchHardSoftMarginTripletLoss, {}, {"name": "triplet", "margin": 0.0, "soft": True}),
    (BatchAllTripletLoss, {"margin": 0.2}, {"name": "triplet-all", "margin": 0.2}),
    (
        BatchSemiHardTripletLoss,
        {"margin": 0.4},
        {"name": "triplet-semi-hard", "margin": 0.4, "distance": "euclidean"},
    ),
]


@pytest.mark.parametrize(("loss", "theirs", "settings"), TRIPLETS, ids=lambda value: getattr(value, "__name__", ""))
def test_triplets_of_pairs_are_triplets_of_two_samples_a_label(
    views: Views, loss: Any, theirs: dict[str, Any], settings: dict[str, Any]
) -> None:
    labels = torch.arange(COUNT).repeat(2)
    expected = peer(loss, **theirs).compute_loss_from_embeddings([torch.cat([views["a"], views["b"]])], labels)
    # The peer's square roots carry 1e-16 below them.
    assert_same(ours(views, same_side=True, **settings), expected, views["a"], views["b"], bound=1e-6)


def test_cosent(views: Views, score: Tensor) -> None:
    expected = peer(CoSENTLoss, scale=20.0).compute_loss_from_embeddings([views["a"], views["b"]], score)
    assert_same(ours(views, "cosent", score), expected, views["a"], views["b"], bound=1e-6)


def test_angle(views: Views, score: Tensor) -> None:
    expected = peer(AnglELoss, scale=20.0).compute_loss_from_embeddings([views["a"], views["b"]], score)
    assert_same(ours(views, "angle", score, cosine_weight=0.0), expected, views["a"], views["b"], bound=1e-6)


def test_score_regression(views: Views, score: Tensor) -> None:
    expected = peer(CosineSimilarityLoss).compute_loss_from_embeddings([views["a"], views["b"]], score)
    assert_same(ours(views, "score-regression", score), expected, views["a"], views["b"])
