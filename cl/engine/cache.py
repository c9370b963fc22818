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
from typing import TypeVar

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


def cached_backward(
    encode: Callable[[Chunk, Collection[str]], Mapping[str, Tensor]],
    chunks: Sequence[Chunk],
    objective: Callable[[Mapping[str, Tensor]], Outcome],
    *,
    device: torch.device,
    parameters: Sequence[Tensor] = (),
    frozen: Collection[str] = (),
    wrapper: nn.Module | None = None,
) -> Outcome:
    """Forward and backward of one batch that is encoded chunk by chunk.

    Gradients are accumulated in `.grad` of the encoder's and the objective's parameters. Under DDP or FSDP they are
    synchronised once, with the last chunk.

    Args:
        encode: `encode(chunk, skip)` gives name -> embeddings [n, D] of the chunk's views other than those in `skip`;
            it must go through `wrapper` where there is one.
        chunks: the parts of this worker's batch, at least one (of no samples on an empty worker).
        objective: from all chunks' embeddings (name -> [B, D], in order) to the outcome.
        device: of the encoder, whose random state is replayed as well.
        parameters: the objective's own parameters (temperature, bias).
        frozen: views whose tower is not trained; they are encoded once.
        wrapper: the DDP or FSDP2 module, if any.

    Returns:
        The outcome; its loss has no graph any more.

    Raises:
        ConfigError: the wrapper is a DDP with a static graph, which cannot accumulate.
    """
    if isinstance(wrapper, DistributedDataParallel) and wrapper.static_graph:
        raise ConfigError(
            "Gradient caching accumulates over chunks, which DDP cannot do with static_graph=True: wrap the model "
            "with static_graph=False (find_unused_parameters=True if a tower has parameters that it does not use)."
        )
    states: list[_RandomState] = []
    parts: list[Mapping[str, Tensor]] = []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_RandomState(device))
            parts.append(encode(chunk, ()))
    # Casts that autocast made without a graph must not serve the second pass: their weights would get no gradient.
    torch.clear_autocast_cache()
    leaves = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    trained = [name for name in leaves if name not in frozen]
    for name in trained:
        leaves[name].requires_grad_()
    with torch.enable_grad():
        outcome = objective(leaves)
        own = [parameter for parameter in parameters if parameter.requires_grad]
        targets = [*(leaves[name] for name in trained), *own]
        slopes = torch.autograd.grad(outcome.loss, targets, allow_unused=True, materialize_grads=True)
    slope_of = dict(zip(trained, slopes, strict=False))
    start = 0
    for number, (chunk, state, part) in enumerate(zip(chunks, states, parts, strict=True)):
        rows = len(part[trained[0]]) if trained else 0
        last = number + 1 == len(chunks)
        with _synchronised(wrapper, last), state.replayed():
            again = encode(chunk, frozen)
            # One number whose gradient to every embedding is the cached one.
            total = sum((again[name] * slope_of[name][start : start + rows]).sum() for name in trained)
            if last:  # the objective's parameters ride along, so that a wrapper synchronises them as well
                for parameter, slope in zip(own, slopes[len(trained) :], strict=True):
                    total = total + (parameter * slope).sum()
            if isinstance(total, Tensor):
                total.backward()
        start += rows
    return Outcome(outcome.loss.detach(), outcome.metrics)


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
