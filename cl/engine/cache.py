"""Gradient caching: a contrastive batch of any size in the memory of a micro-batch.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup":

    1. encode every chunk without a graph and keep only its embeddings (and the random state before it)
    2. the objective on all embeddings gives the loss and the gradient of each embedding
    3. encode every chunk again, with a graph and the same random numbers, and send its embeddings' gradients back

The result is that of one large batch, not an average over small ones. Dropout, patch dropout and drop path draw the
same masks in both passes; without that the gradient is wrong by a fifth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from cl.engine.outcome import Outcome
from cl.errors import ConfigError

Chunk = TypeVar("Chunk")


class _RandomState:
    """The state of all random generators that encoding a chunk may draw from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(torch.empty(0, device=device))

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw again what was drawn after this state was taken; afterwards go on as if nothing had been drawn."""
        now = _RandomState(self.device)
        self._set()
        try:
            yield
        finally:
            now._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.devices:
            set_device_states(self.devices, self.states, device_type=self.device.type)


class CachedBatch(Generic[Chunk]):
    """One batch that is encoded chunk by chunk: `evaluate` gives the loss, `backward` the gradients.

    Args:
        encode: `encode(chunk, skip)` gives name -> embeddings [n, D] of the chunk's views other than those in `skip`;
            it must go through `wrapper` where there is one.
        chunks: the parts of this worker's batch, at least one (of no samples on an empty worker).
        device: of the encoder, whose random state is replayed as well.
        frozen: views whose tower is not trained; they are encoded once.
        wrapper: the DDP or FSDP2 module, if any.

    Raises:
        ConfigError: the wrapper is a DDP with a static graph, which cannot accumulate.
    """

    def __init__(
        self,
        encode: Callable[[Chunk, Collection[str]], Mapping[str, Tensor]],
        chunks: Sequence[Chunk],
        *,
        device: torch.device,
        frozen: Collection[str] = (),
        wrapper: nn.Module | None = None,
    ) -> None:
        if isinstance(wrapper, DistributedDataParallel) and wrapper.static_graph:
            raise ConfigError(
                "Gradient caching accumulates over chunks, which DDP cannot do with static_graph=True: wrap the model "
                "with static_graph=False."
            )
        self.encode, self.chunks, self.frozen, self.wrapper = encode, chunks, frozen, wrapper
        self.states: list[_RandomState] = []
        parts: list[Mapping[str, Tensor]] = []
        with torch.no_grad():
            for chunk in chunks:
                self.states.append(_RandomState(device))
                parts.append(encode(chunk, ()))
        # Casts that autocast made without a graph must not serve the second pass: their weights would get no gradient.
        torch.clear_autocast_cache()
        self.rows = [{name: len(value) for name, value in part.items()} for part in parts]
        self.views = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.trained = [name for name in self.views if name not in frozen]
        self.own: list[Tensor] = []
        self.slopes: tuple[Tensor, ...] = ()

    def evaluate(
        self, objective: Callable[[Mapping[str, Tensor]], Outcome], parameters: Sequence[Tensor] = ()
    ) -> Outcome:
        """The outcome of the objective on all embeddings (name -> [B, D], in order); its loss has no graph.

        Args:
            objective: called once.
            parameters: the objective's own (temperature, bias).
        """
        for name in self.trained:
            self.views[name].requires_grad_()
        with torch.enable_grad():
            outcome = objective(self.views)
            self.own = [parameter for parameter in parameters if parameter.requires_grad]
            targets = [*(self.views[name] for name in self.trained), *self.own]
            self.slopes = torch.autograd.grad(outcome.loss, targets, allow_unused=True, materialize_grads=True)
        return Outcome(outcome.loss.detach(), outcome.metrics)

    def backward(self, factor: Tensor | float = 1.0) -> None:
        """Accumulate the gradient of `factor` times the loss in `.grad` of the encoder's and objective's parameters.

        Under DDP or FSDP the gradients are synchronised once, with the last chunk.
        """
        slope_of = dict(zip(self.trained, self.slopes, strict=False))
        start = dict.fromkeys(self.trained, 0)  # views of mined negatives have rows of their own number
        for number, (chunk, state, rows) in enumerate(zip(self.chunks, self.states, self.rows, strict=True)):
            last = number + 1 == len(self.chunks)
            with torch.enable_grad(), _synchronised(self.wrapper, last), state.replayed():
                again = self.encode(chunk, self.frozen)
                # One number whose gradient to every embedding is the cached one.
                total = sum(
                    (again[name] * slope_of[name][start[name] : start[name] + rows[name]]).sum()
                    for name in self.trained
                )
                if last:  # the objective's parameters ride along, so that a wrapper synchronises them as well
                    for parameter, slope in zip(self.own, self.slopes[len(self.trained) :], strict=True):
                        total = total + (parameter * slope).sum()
                    if isinstance(self.wrapper, DistributedDataParallel):
                        # DDP waits for every parameter; one that no view uses takes part with slope 0.
                        for parameter in self.wrapper.parameters():
                            if parameter.requires_grad:
                                total = total + 0.0 * parameter.sum()
                if isinstance(total, Tensor):
                    (factor * total).backward()
            start = {name: first + rows[name] for name, first in start.items()}


@contextlib.contextmanager
def _synchronised(wrapper: nn.Module | None, wanted: bool) -> Iterator[None]:
    """Synchronise gradients in this backward pass, or only accumulate them."""
    if isinstance(wrapper, DistributedDataParallel) and not wanted:
        with wrapper.no_sync():
            yield
    elif isinstance(wrapper, FSDPModule):
        wrapper.set_requires_gradient_sync(wanted)
        yield
    else:
        yield
