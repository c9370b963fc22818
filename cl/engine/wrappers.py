"""How gradient caching drives DDP and FSDP2: gradients are synchronised once a batch, not once a chunk.

Both wrappers average: DDP over its process group, FSDP2 over its whole mesh (shard x replicate); that is the P of
`cl.engine.collectives`. A parameter of the objective that the wrapper does not hold is averaged over the same workers
here, by one small all-reduce; under FSDP2, which takes no scalars, every temperature is such a parameter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cl.errors import ConfigError


class Unwrapped:
    """A process alone, or a caller who synchronises gradients by means of their own."""

    groups: Sequence[dist.ProcessGroup] = ()  # one after the other they average over all workers

    def rounds(self, chunks: int, device: torch.device) -> int:
        """How many chunks this worker has to encode so that all keep step, where it has `chunks` of its own."""
        return chunks

    def encoded(self) -> None:
        """The first pass is over."""

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one chunk; gradients are synchronised with the `last`."""
        yield

    def awaited(self) -> Sequence[Tensor]:
        """Parameters that must get a gradient from the last chunk, be it 0."""
        return ()

    def holds(self, parameter: Tensor) -> bool:
        """Whether the gradient of a parameter rides along with the last chunk, where the wrapper may synchronise it."""
        return True

    def averaged(self, parameters: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """The slopes of parameters, averaged where the wrapper will not do it."""
        result = list(slopes)
        free = [n for n, parameter in enumerate(parameters) if not self.holds(parameter)]
        if free:
            flat = torch.cat([result[n].flatten() for n in free])
            for group in self.groups:
                dist.all_reduce(flat, group=group)
                flat /= dist.get_world_size(group)
            for n, part in zip(free, flat.split([result[n].numel() for n in free]), strict=True):
                result[n] = part.view_as(result[n])
        return result


class _DDP(Unwrapped):
    def __init__(self, module: DistributedDataParallel) -> None:
        if module.static_graph:
            raise ConfigError(
                "Gradient caching accumulates over chunks, which DDP cannot do with static_graph=True: wrap the model "
                "with static_graph=False."
            )
        self.module = module
        self.groups = [module.process_group]
        ignored = module.parameters_to_ignore
        self.held = [p for name, p in module.module.named_parameters() if name not in ignored and p.requires_grad]
        if module.find_unused_parameters:
            # What the last chunk's forward pass does not reach is ready before backward begins, so nothing may ride
            # along with it; what chunks before it reached is synchronised all the same.
            self.held = []
        self.ids = {id(parameter) for parameter in self.held}

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self.module.no_sync():
            yield

    def awaited(self) -> Sequence[Tensor]:
        return self.held

    def holds(self, parameter: Tensor) -> bool:
        return id(parameter) in self.ids


class _FSDP(Unwrapped):
    def __init__(self, module: nn.Module, sharded_gradients: bool) -> None:
        self.module, self.sharded_gradients = module, sharded_gradients
        self.parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
        for part in self.parts:  # an evaluation before this step may have left weights gathered
            part.reshard()
        # All that FSDP holds is sharded now; what is not was left out by the user.
        self.ignored = {id(p) for p in module.parameters() if not isinstance(p, DTensor)}
        mesh = next(p.device_mesh for p in module.parameters() if isinstance(p, DTensor))
        self.groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        self.kept: list[FSDPModule] = []

    def rounds(self, chunks: int, device: torch.device) -> int:
        """Encoding gathers weights, so all workers encode equally often; one small all-reduce a mesh dimension."""
        most = torch.tensor(chunks, device=device)
        for group in self.groups:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        return int(most)

    def encoded(self) -> None:
        """See which weights the user lets stay gathered after a forward pass: they may stay until the last chunk."""
        self.kept = [part for part in self.parts if self._gathered(part)]

    def _gathered(self, part: nn.Module) -> bool:
        if any(not isinstance(p, DTensor) and id(p) not in self.ignored for p in part.parameters(recurse=False)):
            return True
        return any(self._gathered(child) for child in part.children() if not isinstance(child, FSDPModule))

    @contextlib.contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        for part in self.parts:
            part.set_requires_gradient_sync(last or self.sharded_gradients, recurse=False)
            part.set_requires_all_reduce(last, recurse=False)
            if part in self.kept:
                part.set_reshard_after_backward(False, recurse=False)
        yield
        if last:
            for kept in self.kept:
                kept.set_reshard_after_backward(True, recurse=False)
                kept.reshard()

    def holds(self, parameter: Tensor) -> bool:
        if isinstance(parameter, DTensor):
            raise ConfigError(
                "A parameter of the objective is sharded, but the objective runs outside of the model's forward pass: "
                "name it in the ignored_params of fully_shard."
            )
        return any(parameter is other for other in self.module.parameters()) and id(parameter) not in self.ignored


def driver(module: nn.Module | None, sharded_gradients: bool) -> Unwrapped:
    """What drives `module`: DDP, FSDP2 (the root or parts of it), either of them compiled, or neither.

    Raises:
        ConfigError: a DDP with a static graph.
    """
    module = getattr(module, "_orig_mod", module)  # torch.compile
    if isinstance(module, DistributedDataParallel):
        return _DDP(module)
    if module is not None and any(isinstance(part, FSDPModule) for part in module.modules()):
        return _FSDP(module, sharded_gradients)
    return Unwrapped()
