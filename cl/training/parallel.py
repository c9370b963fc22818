"""How weights, gradients and optimizer lie on the workers, and what is recomputed or compiled.

    ddp    every worker holds all of it; gradients are averaged
    fsdp   every worker holds its shard; a block's weights are gathered when it runs (FSDP2, torch's fully_shard)
    hsdp   groups of `shard_size` workers hold one copy among them, and the groups are replicas

All three give the same gradients, those of the global batch, and a checkpoint made by one of them goes on with another.
The parameters of the objective (a temperature, prototypes) are small, and every worker holds them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cl.engine.collectives import Workers
from cl.errors import ConfigError
from cl.training.config import ParallelConfig
from cl.training.step import TrainStep


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a tower: the members of its lists of modules of one class.

    They have parts of their own: a list of plain layers is not worth a call for each.
    """
    found: list[nn.Module] = []
    for child in module.children():
        parts = list(child.children())
        listed = isinstance(child, nn.ModuleList) or (isinstance(child, nn.Sequential) and len(parts) > 1)
        alike = len({type(part) for part in parts}) == 1 and all(any(True for _ in part.children()) for part in parts)
        if listed and alike and any(True for _ in child.parameters()):
            found += parts
        else:
            found += blocks_of(child)
    return found


def prepare(step: TrainStep, config: ParallelConfig, device: torch.device) -> None:
    """Recompute, compile and shard as configured, in place; before the optimizer is built.

    Raises:
        ConfigError: a number of workers that `shard_size` does not divide; batch norms that cannot be shared.
    """
    towers = [*step.model.towers.values()]
    if config.activation_checkpointing:
        for tower in towers:
            chosen = {id(block) for block in blocks_of(tower)}
            apply_activation_checkpointing(tower, check_fn=lambda module, chosen=chosen: id(module) in chosen)
    if config.compile:
        for tower in towers:
            for block in blocks_of(tower):
                block.compile()
    if config.strategy == "ddp" or step.workers.size == 1:
        return
    share_statistics(step, device)
    mesh = _mesh(step.workers, config, device)
    for model in [step.model, *(teacher.model for teacher in step.teachers.values())]:
        for tower in model.towers.values():
            for block in blocks_of(tower):
                _shard(block, mesh, config.reshard)
            if model is not step.model:  # a teacher's towers are called one by one
                _shard(tower, mesh, config.reshard)
        if model is step.model:
            _shard(model, mesh, config.reshard)


def _shard(module: nn.Module, mesh: DeviceMesh, reshard: bool) -> None:
    scalars = {parameter for parameter in module.parameters() if parameter.dim() == 0}  # cannot be sharded
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard, ignored_params=scalars)


def _mesh(workers: Workers, config: ParallelConfig, device: torch.device) -> DeviceMesh:
    if config.strategy == "fsdp":
        if workers.group is None:
            return init_device_mesh(device.type, (workers.size,))
        return DeviceMesh.from_group(workers.group, device.type)
    assert config.shard_size is not None
    replicas, rest = divmod(workers.size, config.shard_size)
    if rest:
        raise ConfigError(
            f"parallel.shard_size is {config.shard_size}, which does not divide the {workers.size} workers."
        )
    return init_device_mesh(device.type, (replicas, config.shard_size), mesh_dim_names=("replicate", "shard"))


def share_statistics(step: TrainStep, device: torch.device) -> None:
    """Batch norms take the statistics of all workers.

    Raises:
        ConfigError: they cannot.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in step.modules()):
        return
    if device.type != "cuda":
        raise ConfigError(
            "The model has batch norms, whose statistics only workers on GPUs can share: train it with one worker."
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(step)


def wrap(step: TrainStep, device: torch.device, cached: bool = False) -> nn.Module:
    """What the loop calls: the step itself, or in a DDP where weights are replicated.

    The graph is the same at every step, which also lets DDP pass over parameters that a tower has but does not use.
    Gradient caching (`cached`) accumulates over several graphs and sees to such parameters itself.

    Raises:
        ConfigError: batch norms whose statistics the workers cannot share.
    """
    if step.workers.size == 1 or is_sharded(step):
        return step
    share_statistics(step, device)
    return DistributedDataParallel(
        step,
        process_group=step.workers.group,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=not cached,
    )


def is_sharded(module: nn.Module) -> bool:
    """Whether some weights are spread over the workers."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def average_unsharded(step: TrainStep, done: Iterable[nn.Parameter] = ()) -> None:
    """Average the gradients of what FSDP does not hold (scalars, the objective's), other than those `done`."""
    if step.workers.size == 1 or not is_sharded(step):
        return
    skipped = {id(parameter) for parameter in done}
    own = [p for p in step.parameters() if p.requires_grad and not isinstance(p, DTensor) and id(p) not in skipped]
    if not own:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in own])
    dist.all_reduce(flat, group=step.workers.group)
    flat /= step.workers.size
    for parameter, part in zip(own, flat.split([p.numel() for p in own]), strict=True):
        parameter.grad = part.view_as(parameter)
