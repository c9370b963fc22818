"""Cached gradients equal those of the whole batch at once: encoders' weights and temperature, dropout included."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from cl.engine.cache import CachedBatch
from cl.engine.collectives import Workers
from cl.errors import ConfigError
from cl.objectives import Objective, ObjectiveConfig, Outcome, build_objective
from cl.pairs import Pairs
from tests.distributed.pool import Pool

CPU = torch.device("cpu")


class Towers(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 6))
        self.text = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 6))
        self.idle = nn.Parameter(torch.ones(2))  # no view uses it
        self.objective: Objective = build_objective(ObjectiveConfig())
        self.double()

    def forward(self, inputs: Mapping[str, Tensor], skip: Collection[str] = ()) -> dict[str, Tensor]:
        return {name: normalize(getattr(self, name)(x), dim=1) for name, x in inputs.items() if name not in skip}


def data(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(rows, 5, generator=generator, dtype=torch.float64),
        "text": torch.randn(rows, 4, generator=generator, dtype=torch.float64),
    }


def chunked(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    rows = len(batch["image"])
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, max(rows, 1), size)]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def run_cached(towers: Towers, call: nn.Module, workers: Workers, batch: dict[str, Tensor], size: int) -> Outcome:
    cached = CachedBatch(
        lambda chunk, skip: call(chunk, skip),
        chunked(batch, size),
        device=CPU,
        wrapper=call if call is not towers else None,
    )
    outcome = cached.evaluate(
        lambda views: towers.objective(Pairs(views), workers), list(towers.objective.parameters())
    )
    cached.backward()
    return outcome


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_equals_whole_batch(size: int) -> None:
    batch = data(10, seed=1)
    whole = Towers(0.0)
    outcome = whole.objective(Pairs(whole(batch)), Workers())
    outcome.loss.backward()
    cached = Towers(0.0)
    result = run_cached(cached, cached, Workers(), batch, size)
    assert abs(result.loss - outcome.loss) < 1e-14
    expected, found = gradients(whole), gradients(cached)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-13)


def test_dropout_draws_the_same_masks_in_both_passes() -> None:
    """Equals one graph over the same chunks with the same random numbers."""
    batch = data(12, seed=2)
    whole = Towers(0.5)
    torch.manual_seed(7)
    parts = [whole(chunk) for chunk in chunked(batch, 4)]
    views = {name: torch.cat([part[name] for part in parts]) for name in batch}
    whole.objective(Pairs(views), Workers()).loss.backward()
    cached = Towers(0.5)
    torch.manual_seed(7)
    run_cached(cached, cached, Workers(), batch, 4)
    after = torch.rand(1)
    torch.manual_seed(7)
    for chunk in chunked(batch, 4):
        whole(chunk)
    assert after == torch.rand(1)  # the random stream goes on as if each chunk had been encoded once
    for name, value in gradients(whole).items():
        torch.testing.assert_close(gradients(cached)[name], value, rtol=1e-10, atol=1e-13)


def test_random_numbers_that_cannot_be_replayed_are_refused() -> None:
    """Else the gradient would be wrong, and nobody would see it."""
    towers = Towers(0.0)
    generator = torch.Generator().manual_seed(0)

    def encode(chunk: dict[str, Tensor], skip: Collection[str]) -> dict[str, Tensor]:
        kept = {k: x * (torch.rand(x.shape, generator=generator) > 0.3) for k, x in chunk.items()}
        return towers(kept, skip)

    cached = CachedBatch(encode, chunked(data(12, seed=2), 4), device=CPU)
    cached.evaluate(lambda views: towers.objective(Pairs(views), Workers()))
    with pytest.raises(ConfigError, match="random numbers"):
        cached.backward()


def test_frozen_view_is_encoded_once() -> None:
    towers = Towers(0.0)
    towers.text.requires_grad_(False)
    calls: list[tuple[str, ...]] = []

    def encode(chunk: dict[str, Tensor], skip: Collection[str]) -> dict[str, Tensor]:
        views = towers(chunk, skip)
        calls.append(tuple(views))
        return views

    cached = CachedBatch(encode, chunked(data(4, 3), 2), device=CPU, frozen=("text",))
    cached.evaluate(lambda views: towers.objective(Pairs(views), Workers()))
    cached.backward()
    assert calls == [("image", "text")] * 2 + [("image",)] * 2
    assert all(parameter.grad is not None for parameter in towers.image.parameters())
    assert all(parameter.grad is None for parameter in towers.text.parameters())


def test_autocast_around_everything_keeps_weight_gradients() -> None:
    """Without clearing autocast's cache the second pass would use casts that have no graph."""
    towers = Towers(0.0).float()
    batch = {name: value.float() for name, value in data(6, 4).items()}
    with torch.autocast("cpu", torch.bfloat16):
        run_cached(towers, towers, Workers(), batch, 3)
    assert all(p.grad is not None and p.grad.any() for n, p in towers.named_parameters() if n.endswith("weight"))


def test_two_workers_under_ddp(pool: Pool) -> None:
    """One all-reduce at the end; the averaged gradient is that of one process with the whole batch, step after step."""
    whole = Towers(0.0)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        whole.objective(Pairs(whole(data(9, seed=step))), Workers()).loss.backward()
        optimizer.step()
    for found in pool.run(_train_cached, 2):
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)


def _train_cached(workers: Workers) -> dict[str, Tensor]:
    towers = Towers(0.0)
    call = DistributedDataParallel(towers, process_group=workers.group)
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.5)
    mine = slice(0, 5) if workers.rank == 0 else slice(5, 9)
    for step in range(3):
        optimizer.zero_grad()
        batch = {name: value[mine] for name, value in data(9, seed=step).items()}
        run_cached(towers, call, workers, batch, 2)
        optimizer.step()
    dist.barrier(workers.group)
    return towers.state_dict()


def test_static_graph_is_refused(pool: Pool) -> None:
    for message in pool.run(_static_graph, 2):
        assert "static_graph=False" in message


def _static_graph(workers: Workers) -> str:
    towers = Towers(0.0)
    call = DistributedDataParallel(towers, process_group=workers.group, static_graph=True)
    with pytest.raises(ConfigError) as caught:
        run_cached(towers, call, workers, data(4, seed=0), 2)
    return str(caught.value)
