"""Gradient caching: a contrastive batch of any size in the memory of a micro-batch.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup":

    1. encode every chunk without a graph and keep only its embeddings (and the random state before it)
    2. the objective on all embeddings gives the loss and the gradient of each embedding
    3. encode every chunk again, with a graph and the same random numbers, and send its embeddings' gradients back

The result is that of one large batch, not an average over small ones. Dropout, patch dropout and drop path draw the
same masks in both passes; without that the gradient is wrong by a fifth. Batch norms see a chunk at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from cl.engine.outcome import Outcome
from cl.engine.wrappers import driver
from cl.errors import ConfigError

Chunk = TypeVar("Chunk")

# How far the embeddings of the two passes may be apart, relative to their length. Rounding makes up to 0.007 (bf16,
# passes compiled apart), other random numbers 0.07 and more (a tenth of the patches dropped).
TOLERANCE = 0.03


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


@dataclass
class _Encoding(Generic[Chunk]):
    """One call of the encoder, which the second pass makes again."""

    chunk: Chunk
    skip: Collection[str]
    state: _RandomState
    rows: Mapping[str, slice]  # of each view that it gave; no rows where it only keeps step with other workers


class CachedBatch(Generic[Chunk]):
    """One batch that is encoded chunk by chunk: `evaluate` gives the loss, `backward` the gradients.

    Args:
        encode: `encode(chunk, skip)` gives name -> embeddings [n, D] of the chunk's views other than those in `skip`;
            it must go through `wrapper` where there is one.
        chunks: the parts of this worker's batch, at least one (of no samples on an empty worker).
        device: of the encoder, whose random state is replayed as well.
        groups: the batch's views, by what is encoded together; the graph in memory is that of one group of one chunk.
            None: all views at once.
        frozen: views whose tower is not trained; they are encoded once.
        wrapper: the DDP or FSDP2 module, if any. Under FSDP2, where encoding is a collective, a worker with fewer
            chunks than others encodes its last one again, without effect.
        sharded_gradients: under FSDP2, keep only this worker's shard of the gradients between chunks, at the cost of a
            reduce-scatter a chunk. Replicas all-reduce once either way.

    Raises:
        ConfigError: the wrapper is a DDP with a static graph, which cannot accumulate.
    """

    def __init__(
        self,
        encode: Callable[[Chunk, Collection[str]], Mapping[str, Tensor]],
        chunks: Sequence[Chunk],
        *,
        device: torch.device,
        groups: Sequence[Collection[str]] | None = None,
        frozen: Collection[str] = (),
        wrapper: nn.Module | None = None,
        sharded_gradients: bool = False,
    ) -> None:
        self.encode, self.frozen = encode, frozen
        self.driver = driver(wrapper, sharded_gradients)
        names = [name for group in groups or () for name in group]
        skips = [[name for name in names if name not in group] for group in groups] if groups else [[]]
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        ends = dict.fromkeys(names, 0)
        self.encodings: list[_Encoding[Chunk]] = []
        with torch.no_grad():
            for number in range(self.driver.rounds(len(chunks), device)):
                chunk, counts = chunks[min(number, len(chunks) - 1)], number < len(chunks)
                for skip in skips:
                    state = _RandomState(device)
                    rows = {}
                    for name, found in encode(chunk, skip).items():
                        start = ends.get(name, 0)
                        ends[name] = start + len(found) * counts
                        rows[name] = slice(start, ends[name])
                        if counts:
                            parts.setdefault(name, []).append(found)
                    self.encodings.append(_Encoding(chunk, [*skip, *frozen], state, rows))
        self.driver.encoded()
        # Casts that autocast made without a graph must not serve the second pass: their weights would get no gradient.
        torch.clear_autocast_cache()
        self.views = {name: torch.cat(part) for name, part in parts.items()}
        self.trained = [name for name in self.views if name not in frozen]
        self.own: list[Tensor] = []
        self.slopes: tuple[Tensor, ...] = ()

    def evaluate(
        self, objective: Callable[[Mapping[str, Tensor]], Outcome], parameters: Sequence[Tensor] = ()
    ) -> Outcome:
        """The outcome of the objective on all embeddings (name -> [B, D], in order); its loss has no graph.

        Args:
            objective: called once.
            parameters: the objective's own (temperature, bias). Those that the wrapper does not hold are averaged over
                its workers all the same.
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

        Under DDP or FSDP2 the gradients are synchronised once, with the last chunk.

        Raises:
            ConfigError: the second pass gave other embeddings than the first, so the gradients are wrong.
        """
        slope_of = dict(zip(self.trained, self.slopes, strict=False))
        own_slopes = self.driver.averaged(self.own, self.slopes[len(self.trained) :])
        first = {name: view.detach() for name, view in self.views.items()}
        encodings = [each for each in self.encodings if not each.rows.keys() <= set(self.frozen)]
        encodings = encodings or self.encodings[-1:]  # the objective's parameters need one to ride along with
        apart: Tensor | float = 0.0
        for number, each in enumerate(encodings):
            last = number + 1 == len(encodings)
            with torch.enable_grad(), self.driver.accumulating(last), each.state.replayed():
                total: Tensor | float = 0.0
                for name, found in self.encode(each.chunk, each.skip).items():
                    rows = each.rows[name]
                    found = found[: rows.stop - rows.start]
                    # One number whose gradient to every embedding is the cached one.
                    total = total + (found * slope_of[name][rows]).sum()
                    apart = apart + (found.detach() - first[name][rows]).float().square().sum()
                if last:
                    for parameter, slope in zip(self.own, own_slopes, strict=True):
                        if self.driver.holds(parameter):
                            total = total + (parameter * slope).sum()
                    for parameter in self.driver.awaited():
                        total = total + 0.0 * parameter.sum()
                if isinstance(total, Tensor):
                    (factor * total).backward()
        for parameter, slope in zip(self.own, own_slopes, strict=True):
            if not self.driver.holds(parameter):
                parameter.grad = factor * slope if parameter.grad is None else parameter.grad.add_(factor * slope)
        if apart > TOLERANCE**2 * sum(first[name].float().square().sum() for name in self.trained):
            raise ConfigError(
                "The two passes of gradient caching gave different embeddings, so the gradients are wrong: the encoder "
                "draws random numbers that are not PyTorch's, changes its state in a forward pass, or torch.compile "
                "reached its recompile_limit between the passes."
            )
