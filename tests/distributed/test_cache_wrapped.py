"""Gradient caching under DDP and FSDP2 equals the formula on the whole batch in one process, in float64.

Dropout, patch dropout, drop path, activation checkpointing, hard negatives, temperature, uneven and empty batches, over
several steps; and how often the workers talk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from cl.engine.cache import CachedBatch
from cl.engine.collectives import Workers
from cl.errors import ConfigError
from tests.distributed.cached_towers import (
    CPU,
    Chunk,
    Model,
    apart,
    cached,
    chunks_of,
    formula,
    ranking,
    reference,
)
from tests.distributed.pool import Pool

EXACT = 1e-12
STEPS = 3


def ddp(model: nn.Module, workers: Workers, **settings: bool) -> DistributedDataParallel:
    return DistributedDataParallel(model, process_group=workers.group, **settings)  # type: ignore[arg-type]


def sharded(model: Model, mesh: DeviceMesh, reshard: bool | None = None) -> Model:
    """FSDP2 on every block, then on the rest; the temperature is a scalar, which FSDP2 does not take."""
    for block in [*model.image.blocks, *model.text.blocks]:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard, ignored_params={model.log_scale})
    return model


def two_by_two() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def train(call: nn.Module, model: Model, workers: Workers, rows: tuple[int, ...], **choices: bool) -> list[float]:
    """How far each step's loss and gradients are from the reference, while both models train."""
    whole = Model(model.image.patches.prob, model.image.checkpointed)
    errors = []
    for step in range(STEPS):
        for each in (call, whole):
            each.zero_grad()
        loss = cached(call, model, workers, rows[workers.rank], step, **choices)
        right = reference(whole, rows, step)
        errors += [apart(model, whole), float((loss - right).abs())]
        for each in (model, whole):
            torch.optim.SGD(each.parameters(), lr=0.1).step()
    return errors


def _ddp(
    workers: Workers, rows: tuple[int, ...], rate: float, checkpointed: bool, singly: bool, settings: dict[str, bool]
) -> list[float]:
    model = Model(rate, checkpointed)
    return train(ddp(model, workers, **settings), model, workers, rows, singly=singly)


@pytest.mark.parametrize(
    ("rate", "checkpointed", "singly"), [(0.0, False, False), (0.3, True, False), (0.3, False, True)]
)
@pytest.mark.parametrize("rows", [(4, 4), (5, 0, 3)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}], ids=str)
def test_ddp(
    pool: Pool, rows: tuple[int, ...], rate: float, checkpointed: bool, singly: bool, settings: dict[str, bool]
) -> None:
    for errors in pool.run(_ddp, len(rows), rows, rate, checkpointed, singly, settings):
        assert max(errors) < EXACT


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...]
    rate: float
    checkpointed: bool
    reshard: bool | None
    singly: bool
    shards: bool


def _fsdp(workers: Workers, case: Case) -> list[float]:
    assert workers.group is not None
    mesh = DeviceMesh.from_group(workers.group, "cpu")
    model = sharded(Model(case.rate, case.checkpointed), mesh, case.reshard)
    return train(model, model, workers, case.rows, singly=case.singly, shards=case.shards)


@pytest.mark.parametrize(
    "case",
    [
        Case((4, 4), 0.0, False, True, singly=False, shards=False),
        Case((5, 0, 3), 0.3, True, None, singly=False, shards=True),
        Case((0, 5), 0.3, False, False, singly=True, shards=False),
        Case((1, 5), 0.3, True, True, singly=True, shards=True),
        Case((3, 1), 0.3, True, False, singly=False, shards=True),
    ],
    ids=str,
)
def test_fsdp(pool: Pool, case: Case) -> None:
    for errors in pool.run(_fsdp, len(case.rows), case):
        assert max(errors) < EXACT


def _hsdp(workers: Workers, rows: tuple[int, ...], shards: bool) -> list[float]:
    mesh = two_by_two()
    model = sharded(Model(0.3, checkpointed=True), mesh)
    return train(model, model, workers, rows, shards=shards)


@pytest.mark.parametrize("shards", [False, True], ids=["reduced once", "sharded gradients"])
def test_hsdp_averages_over_shards_and_replicas(pool: Pool, shards: bool) -> None:
    """Negatives come from all four workers of a 2 x 2 mesh."""
    for errors in pool.run(_hsdp, 4, (3, 0, 5, 1), shards):
        assert max(errors) < EXACT


def _negatives_of_a_shard_group(workers: Workers) -> float:
    mesh = two_by_two()
    model = sharded(Model(), mesh)
    near = Workers.current(mesh.get_group("shard"), averaged_by=2)
    batch = CachedBatch(model, chunks_of(workers.rank, 3), device=CPU, wrapper=model)
    batch.evaluate(lambda views: ranking(views, model.log_scale, near), [model.log_scale])
    batch.backward()
    whole = Model()
    for first in (0, 2):
        parts = [whole(chunk) for rank in (first, first + 1) for chunk in chunks_of(rank, 3)]
        views = {view: torch.cat([part[view] for part in parts]) for view in parts[0]}
        (formula(views, whole.log_scale) / 2).backward()
    return apart(model, whole)


def test_hsdp_with_negatives_of_the_shard_group_alone(pool: Pool) -> None:
    """Equals the mean of the two groups' losses."""
    assert max(pool.run(_negatives_of_a_shard_group, 4)) < EXACT


def _by_name(talk: CommDebugMode) -> dict[str, int]:
    """How often each collective ran."""
    return {str(name).removeprefix("c10d."): count for name, count in talk.get_comm_counts().items()}


class Counter:
    """State of a DDP hook: the group, and how often the hook ran."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.count = group, 0


def _counted(state: Counter, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    state.count += 1
    return allreduce_hook(state.group, bucket)


# DDP checks the annotations, and wants the classes themselves.
_counted.__annotations__.update({"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]})


def _reductions(workers: Workers) -> tuple[int, dict[str, int]]:
    assert workers.group is not None
    model, counter = Model(), Counter(workers.group)
    call = ddp(model, workers)
    call.register_comm_hook(counter, _counted)
    for step in range(STEPS):
        batch = CachedBatch(call, chunks_of(workers.rank, 5, step), device=CPU, wrapper=call)
        batch.evaluate(lambda views: ranking(views, model.log_scale, workers), [model.log_scale])
        with CommDebugMode() as talk:
            batch.backward()
    return counter.count, _by_name(talk)


def test_ddp_all_reduces_once_a_step(pool: Pool) -> None:
    """The hook sees this model's one bucket once a step, and the second pass has no other collective."""
    for count, talk in pool.run(_reductions, 4):
        assert count == STEPS
        assert talk == {"allreduce_": 1}


def _talk(workers: Workers, reshard: bool | None, shards: bool, replicated: bool) -> tuple[dict[str, int], ...]:
    assert workers.group is not None
    mesh = two_by_two() if replicated else DeviceMesh.from_group(workers.group, "cpu")
    model = sharded(Model(), mesh, reshard)
    chunks = chunks_of(workers.rank, 6)  # three of them
    with CommDebugMode() as first:
        batch = CachedBatch(model, chunks, device=CPU, wrapper=model, sharded_gradients=shards)
    batch.evaluate(lambda views: ranking(views, model.log_scale, workers), [model.log_scale])
    with CommDebugMode() as second:
        batch.backward()
    return _by_name(first), _by_name(second)


# FSDP holds 5 groups of weights: 2 blocks a tower, and the rest, which stays gathered unless the user says otherwise.
# The text tower runs twice a chunk, so 6 blocks run; its 2 blocks reduce what earlier chunks left and then their own.
@pytest.mark.parametrize(
    ("reshard", "shards", "first_gathers", "second_gathers", "scatters"),
    [
        (False, False, 5, 0, 5 + 2),  # weights are gathered once a step, gradients reduced with the last chunk
        (False, True, 5, 0, 3 * 5),
        (None, False, 3 * 6 + 1, 3 * 2 * 6, 5 + 2),  # blocks as often as the user asks for, the rest once
    ],
)
def test_fsdp_gathers_and_reduces_no_more_than_asked_for(
    pool: Pool, reshard: bool | None, shards: bool, first_gathers: int, second_gathers: int, scatters: int
) -> None:
    for first, second in pool.run(_talk, 2, reshard, shards, False):
        assert first["_allgather_base_"] == first_gathers
        assert second.get("_allgather_base_", 0) == second_gathers
        assert second["_reduce_scatter_base_"] == scatters


@pytest.mark.parametrize(("shards", "reductions"), [(False, 5 + 2), (True, 5)])
def test_hsdp_all_reduces_over_replicas_with_the_last_chunk_only(pool: Pool, shards: bool, reductions: int) -> None:
    """And the temperature once over each dimension of the mesh."""
    for _, second in pool.run(_talk, 4, False, shards, True):
        assert second["allreduce_"] == reductions + 2


def _outside(workers: Workers) -> float:
    model = Model()
    towers = nn.ModuleDict({"image": model.image, "text": model.text})

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = towers

        def forward(self, chunk: Chunk, skip: Collection[str] = ()) -> dict[str, Tensor]:
            return model(chunk, skip)

    whole = Model()
    cached(ddp(Towers(), workers), model, workers, 2 + workers.rank)
    reference(whole, (2, 3))
    return apart(model, whole)


def test_a_temperature_outside_of_the_wrapper_is_averaged_all_the_same(pool: Pool) -> None:
    assert max(pool.run(_outside, 2)) < EXACT


def _frozen(workers: Workers, wrapper: str) -> tuple[float, bool]:
    assert workers.group is not None
    whole, model = Model(0.3), Model(0.3)
    for each in (whole, model):
        each.text.requires_grad_(False)
    call = (
        ddp(model, workers) if wrapper == "DDP" else sharded(model, DeviceMesh.from_group(workers.group, "cpu"), True)
    )
    torch.manual_seed(workers.rank)
    frozen = ("text", "hard")
    batch = CachedBatch(call, chunks_of(workers.rank, 3), device=CPU, frozen=frozen, wrapper=call)
    batch.evaluate(lambda views: ranking(views, model.log_scale, workers), [model.log_scale])
    batch.backward()
    reference(whole, (3, 3))
    return apart(model, whole), all(p.grad is None for p in model.text.parameters())


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_frozen_tower(pool: Pool, wrapper: str) -> None:
    for error, untouched in pool.run(_frozen, 2, wrapper):
        assert error < EXACT
        assert untouched


def _autocast(workers: Workers, wrapper: str) -> tuple[float, float]:
    """Embeddings are float32 and those of both ways equal, so gradients differ by the order of float32 sums alone."""
    assert workers.group is not None
    whole, model = Model(0.3).float(), Model(0.3).float()
    mesh = DeviceMesh.from_group(workers.group, "cpu")
    call = ddp(model, workers) if wrapper == "DDP" else sharded(model, mesh)

    def lower(module: nn.Module) -> Callable[..., dict[str, Tensor]]:
        def encode(chunk: Chunk, skip: Collection[str] = ()) -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                views = module({view: x.float() for view, x in chunk.items()}, skip)
            return {view: found.float() for view, found in views.items()}

        return encode

    torch.manual_seed(workers.rank)
    batch = CachedBatch(lower(call), chunks_of(workers.rank, 3), device=CPU, wrapper=call)
    batch.evaluate(lambda views: ranking(views, model.log_scale, workers), [model.log_scale])
    batch.backward()
    reference(whole, (3, 3), encode=lower(whole))
    largest = max(float(p.grad.abs().max()) for p in whole.parameters() if p.grad is not None)
    return apart(model, whole), largest


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_autocast(pool: Pool, wrapper: str) -> None:
    for error, largest in pool.run(_autocast, 2, wrapper):
        assert error < 1e-5 * largest


def _refused(workers: Workers) -> str:
    assert workers.group is not None
    model = Model()
    fully_shard(model, mesh=DeviceMesh.from_group(workers.group, "cpu"), ignored_params={model.log_scale})
    sharded_now = model.idle
    batch = CachedBatch(model, chunks_of(workers.rank, 2), device=CPU, wrapper=model)
    batch.evaluate(lambda views: ranking(views, model.log_scale, workers), [sharded_now])
    with pytest.raises(ConfigError) as caught:
        batch.backward()
    return str(caught.value)


def test_a_sharded_parameter_of_the_objective_is_refused(pool: Pool) -> None:
    for message in pool.run(_refused, 2):
        assert "ignored_params" in message
