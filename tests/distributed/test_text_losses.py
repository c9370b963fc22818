"""The drop-in ranking losses against sentence-transformers' own, on the same model and batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss as TheirsCached,
)
from sentence_transformers.sentence_transformer.losses import (
    MultipleNegativesRankingLoss as Theirs,
)
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

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
    for ours, theirs in [(MultipleNegativesRankingLoss, Theirs), (CachedMultipleNegativesRankingLoss, TheirsCached)]:
        expected = theirs(nn.Sequential(Embedder())).get_config_dict()
        assert list(ours(Embedder()).get_config_dict().items()) == list(expected.items())


def test_settings_may_change_between_steps() -> None:
    """As in the original, where they are attributes: the loss of the next batch has the new scale."""
    theirs = Theirs(Embedder())  # type: ignore[arg-type]
    for ours in (MultipleNegativesRankingLoss(Embedder()), CachedMultipleNegativesRankingLoss(Embedder())):
        ours.scale = theirs.scale = 5.0
        torch.testing.assert_close(run(ours, columns(2))[0], run(theirs, columns(2))[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_evaluates_without_gradients(grad: Any) -> None:
    expected = run(Theirs(Embedder()), columns(3))[0]  # type: ignore[arg-type]
    for loss in (
        MultipleNegativesRankingLoss(Embedder()),
        CachedMultipleNegativesRankingLoss(Embedder(), 20.0, None, 3),
    ):
        with grad():
            value = loss(columns(3))
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        assert not value.requires_grad


class Tokens(nn.Module):
    """Mean of token embeddings under the mask; writes into its features, as pooling without a prompt may do."""

    def __init__(self, kind: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 6, dtype=kind)
        self.linear = nn.Linear(6, 6, dtype=kind)
        self.widths: list[int] = []

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        self.widths.append(features["input_ids"].shape[1])
        hidden = self.linear(self.table(features["input_ids"]))
        mask = features["attention_mask"].clone()
        features["attention_mask"][:, 1] = 0
        mask[:, : int(features["prompt_length"])] = 0
        return {"sentence_embedding": torch.einsum("bld,bl->bd", hidden, mask.to(hidden.dtype))}


def token_columns() -> list[dict[str, Any]]:
    """Two columns of 7 texts of 3 to 9 tokens, the first of which is a prompt."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for lengths in ([3, 9, 4, 4, 3, 5, 3], [4, 3, 3, 8, 3, 3, 9]):
        mask = (torch.arange(9)[None] < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(50, (7, 9), generator=generator)
        found.append({"input_ids": ids, "attention_mask": mask, "prompt_length": torch.tensor([1])})
    return found


@pytest.mark.parametrize(
    ("cut", "widths"),
    [
        ({"mini_batch_size": 3}, [9, 4, 5, 8, 3, 9]),
        ({"mini_batch_num_tokens": 12}, [9, 4, 4, 8, 5, 3, 3, 9]),  # 2, 2, 2 and 1 texts, 12 tokens a column at most
    ],
)
def test_parts_hold_no_padding_and_the_features_as_they_were(cut: dict[str, Any], widths: list[int]) -> None:
    model = Tokens()
    found = run(CachedMultipleNegativesRankingLoss(model, **cut), token_columns())
    expected = run(MultipleNegativesRankingLoss(Tokens()), token_columns())
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-12)
    assert model.widths == widths * 2  # of queries and documents in turn, in both passes


@pytest.mark.parametrize("name", ["offsets", "cu_seq_lens_q", "pixel_values"])
def test_features_that_are_not_by_sample_are_refused(name: str) -> None:
    batch = [{**column, name: torch.zeros(7 if name == "offsets" else 20)} for column in token_columns()]
    with pytest.raises(ConfigError, match=name):
        CachedMultipleNegativesRankingLoss(Tokens())(batch)


def test_second_pass_has_the_autocast_of_the_first() -> None:
    """A loop of one's own ends autocast before `backward`; the gradient is that of the plain loss under it.

    But for the rounding of bfloat16: each column's gradient is rounded before they are added.
    """
    gradients = []
    types: list[torch.dtype] = []
    for kind in (MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss):
        model = Tokens(torch.float32)
        model.linear.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
        loss = kind(model)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(token_columns())
        value.backward()
        gradients.append(gradient(dict(loss.named_parameters())["model.linear.weight"]))
    assert types == [torch.bfloat16] * (2 + 4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-2)


def _on_worker(workers: Workers, cached: bool) -> Tensor:
    mine = slice(2 * workers.rank, 2 * workers.rank + 2)
    kind = CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss
    return run(kind(Embedder(), gather_across_devices=True), columns(3, mine))[1]


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_gathering_over_workers_equals_one_process(pool: Pool, cached: bool) -> None:
    expected = run(Theirs(Embedder()), columns(3))[1]  # type: ignore[arg-type]
    found = torch.stack(pool.run(_on_worker, 4, cached)).mean(0)  # as DDP averages
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def _count(sent: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Averages as DDP does, and notes that it was asked to."""
    sent.append(bucket.index())
    assert dist.group.WORLD is not None
    return allreduce_hook(dist.group.WORLD, bucket)


# DDP reads the types of a hook, which are strings in this file.
_count.__annotations__ |= {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


def _under_ddp(workers: Workers) -> tuple[Tensor, list[int], str]:
    mine = slice(2 * workers.rank, 2 * workers.rank + 2)
    model = DistributedDataParallel(Embedder(), find_unused_parameters=True)
    sent: list[int] = []
    model.register_comm_hook(sent, _count)
    settings: dict[str, Any] = {"mini_batch_size": 1, "gather_across_devices": True}
    found = run(CachedMultipleNegativesRankingLoss(model, **settings), columns(3, mine))[1]
    try:
        static = DistributedDataParallel(Embedder(), static_graph=True)
        CachedMultipleNegativesRankingLoss(static, **settings)(columns(3, mine))
    except ConfigError as error:
        return found, sent, str(error)
    return found, sent, ""


def test_under_ddp_gradients_travel_once(pool: Pool) -> None:
    """With parts of one sample; equal to one process. A static graph is refused."""
    expected = run(Theirs(Embedder()), columns(3))[1]  # type: ignore[arg-type]
    for found, sent, message in pool.run(_under_ddp, 4):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert sent == [0]
        assert "static_graph" in message


def test_direction_without_its_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match="joint"):
        MultipleNegativesRankingLoss(
            Embedder(), directions=("query_to_doc", "query_to_query"), partition_mode="per_direction"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"similarity_fct": lambda a, b: a @ b.T}, "cos_sim or dot_score"),
        ({"similarity_fct": nn.CosineSimilarity()}, "cos_sim or dot_score"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"hardness_mode": "hardest"}, "hardness_mode"),
        ({"hardness_strength": -1.0}, "hardness_strength"),
        ({"directions": ()}, "directions"),
        ({"mini_batch_size": 0}, "mini_batch_size"),
        ({"mini_batch_num_tokens": 0}, "mini_batch_num_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_cannot_be_computed_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CachedMultipleNegativesRankingLoss(Embedder(), **settings)
