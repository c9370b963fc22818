"""The drop-in ranking losses against sentence-transformers' own, on the same model and batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    MultipleNegativesRankingLoss as Theirs,
)
from torch import Tensor, nn

from cl.engine.collectives import Workers
from cl.errors import ConfigError
from cl.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
from tests.distributed.pool import Pool, gradient

OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
CHOICES = [
    {"directions": ("query_to_doc", *chosen), "partition_mode": mode}
    for n in range(4)
    for chosen in itertools.combinations(OTHERS, n)
    for mode in ("joint", "per_direction")
    if mode == "joint" or set(chosen) <= {"doc_to_query"}  # others have no positive in their own softmax
] + [
    {"hardness_mode": mode, "hardness_strength": 3.0}
    for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
]


class Embedder(nn.Module):
    """Stands for a SentenceTransformer: features in, sentence_embedding out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4, bias=False).double()
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, 20).view(4, 5))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.linear(features["x"]).tanh()}


def columns(count: int, rows: slice = slice(None)) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(count)
    return [{"x": torch.randn(8, 5, generator=generator, dtype=torch.float64)[rows]} for _ in range(count)]


def run(loss: nn.Module, batch: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    value = loss(batch, torch.empty(0))
    value.backward()
    return value.detach(), gradient(next(loss.parameters()))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("count", [2, 4], ids=["pairs", "two hard negatives"])
def test_equals_the_original(choice: dict[str, Any], count: int) -> None:
    expected = run(Theirs(Embedder(), **choice), columns(count))  # type: ignore[arg-type]
    plain = run(MultipleNegativesRankingLoss(Embedder(), **choice), columns(count))
    cached = run(CachedMultipleNegativesRankingLoss(Embedder(), mini_batch_size=3, **choice), columns(count))
    for found in (plain, cached):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=0)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-8, atol=1e-12)


def test_config_dict_has_the_originals_fields() -> None:
    theirs = Theirs(Embedder()).get_config_dict()  # type: ignore[arg-type]
    assert MultipleNegativesRankingLoss(Embedder()).get_config_dict() == theirs


def _on_worker(workers: Workers, cached: bool) -> Tensor:
    mine = slice(2 * workers.rank, 2 * workers.rank + 2)
    kind = CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss
    return run(kind(Embedder(), gather_across_devices=True), columns(3, mine))[1]


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_gathering_over_workers_equals_one_process(pool: Pool, cached: bool) -> None:
    expected = run(Theirs(Embedder()), columns(3))[1]  # type: ignore[arg-type]
    found = torch.stack(pool.run(_on_worker, 4, cached)).mean(0)  # as DDP averages
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_direction_without_its_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match="joint"):
        MultipleNegativesRankingLoss(
            Embedder(), directions=("query_to_doc", "query_to_query"), partition_mode="per_direction"
        )


def test_unknown_similarity_is_refused() -> None:
    with pytest.raises(ConfigError, match="cos_sim or dot_score"):
        MultipleNegativesRankingLoss(Embedder(), similarity_fct=lambda a, b: a @ b.T)
