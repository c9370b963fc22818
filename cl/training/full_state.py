"""State dicts whose tensors may be sharded (FSDP2), to and from whole tensors.

Checkpoints hold whole tensors, so a run may go on with another number of workers or another strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def gathered(value: Any, keep: bool) -> Any:
    """A state dict with every shard gathered, tensors on the CPU; all workers call it.

    Args:
        value: a nest of dicts and lists with tensors in it.
        keep: whether this worker wants them; the others hold one tensor at a time and get None for each.
    """
    if isinstance(value, Tensor):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.detach().cpu() if keep else None
    if isinstance(value, Mapping):
        return {key: gathered(each, keep) for key, each in value.items()}
    return [gathered(each, keep) for each in value] if isinstance(value, list) else value


def _laid_out(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the way that `like` lies on the workers."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module, sharded or not; every worker holds all of `state`."""
    there = module.state_dict()
    module.load_state_dict({name: _laid_out(value, there.get(name, value)) for name, value in state.items()})


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state dict of whole tensors; every worker holds all of it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def laid_out(value: Any, like: Tensor) -> Any:
        return _laid_out(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value

    of = {n: {key: laid_out(value, parameters[n]) for key, value in own.items()} for n, own in state["state"].items()}
    optimizer.load_state_dict({**state, "state": of})
