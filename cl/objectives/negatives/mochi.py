"""MoCHi: hard negatives of the queue, mixed with each other and with the query, are further negatives.

    H_i    = the N keys of the queue with the largest <q_i, n>
    h      = unit( alpha n + (1 - alpha) n' ),   n, n' from H_i, alpha from U(0, 1)       s of them for each query
    h'     = unit( beta q_i + (1 - beta) n ),    n from H_i, beta from U(0, 1/2)          s' of them
    loss_i = logsumexp( l_i, <q_i, k> / tau for k in the queue, all h and all h' ) - l_i,  l_i = <q_i, k_i> / tau

Kalantidis et al. 2020, "Hard Negative Mixing for Contrastive Learning". Mixtures are constants: no gradient
reaches q through h'. Every query has its own, made from numbers that depend on the seed, the step and the sample alone.
Needs the teacher's embeddings, as `cl.objectives.state.moco`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cl.engine import randomness
from cl.engine.normalise import unit
from cl.engine.rule import Reductions, Samples, Term, Tile, row_top
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.state.moco import MoCo, MoCoConfig


class MoCHiConfig(MoCoConfig):
    temperature: Scheduled = Field(0.2, description="scores are divided by it")
    hardest: int = Field(1024, ge=1, description="keys of the queue that are mixed, N")
    mixed: int = Field(512, ge=0, description="mixtures of two keys a query, s")
    mixed_with_query: int = Field(256, ge=0, description="mixtures of the query and a key, s'")
    warmup_epochs: int = Field(0, ge=0, description="epochs before negatives are mixed")
    seed: int = Field(0, description="of the choice of keys and shares")


@OBJECTIVES.register(
    "mochi",
    "momentum contrast with mixtures of the hardest negatives",
    paper="Hard Negative Mixing for Contrastive Learning",
)
class MoCHi(MoCo):
    """See the module's formula."""

    Config = MoCHiConfig
    memory: ClassVar[str] = "(batch x mixtures + queue) x dim"

    def __init__(self, config: MoCHiConfig) -> None:
        super().__init__(config)
        self.config = config

    def tile(self, t: Tile) -> Reductions:
        found = super().tile(t)
        if not t.column_view.startswith("queue."):
            return found
        return {**found, "hard": row_top(t.scores, self.config.hardest)}

    def prepare(self, s: Samples) -> Mapping[str, Tensor]:
        """By direction: the mixtures [B, s + s', D], and which samples have any."""
        found = {}
        for number, (query, _) in enumerate(self.queries(list(s.views))):
            # A query's queue is the first that it is compared with: an index is a place in the queue.
            index, queue = s["hard.index", query], self._queues()[number].embeddings
            found[f"mixtures.{number}"] = self._mixtures(
                s, s.views[query].detach().to(queue.dtype), index, queue, number
            )
            some = index[:, 0] >= 0
            found[f"made.{number}"] = some if s.clock.epoch >= self.config.warmup_epochs else torch.zeros_like(some)
        return found

    def _mixtures(self, s: Samples, anchors: Tensor, index: Tensor, queue: Tensor, direction: int) -> Tensor:
        """[B, s + s', D] of anchors [B, D] and the places [B, N] of their hardest keys, the hardest first."""
        config, found = self.config, (index >= 0).sum(1, keepdim=True)

        def numbers(stream: int, count: int) -> Tensor:
            places = torch.arange(count, device=index.device)
            key, counter = s.meta["key"][:, None], places * 0 + 5 * direction + stream
            return randomness.uniform(config.seed, s.clock.step, key, places, counter, dtype=queue.dtype)

        def keys(stream: int, count: int) -> Tensor:
            place = (numbers(stream, count) * found).long()
            return queue[index.gather(1, place).clamp_min(0)]

        alpha = numbers(0, config.mixed)[..., None]
        beta = numbers(1, config.mixed_with_query)[..., None] / 2
        pairs = alpha * keys(2, config.mixed) + (1 - alpha) * keys(3, config.mixed)
        with_query = beta * anchors[:, None] + (1 - beta) * keys(4, config.mixed_with_query)
        return unit(torch.cat([pairs, with_query], 1))

    def finish(self, s: Samples) -> list[Term]:
        scale, terms = self.temperature(), []
        for number, (query, key) in enumerate(self.queries(list(s.views))):
            mixtures = s.prepared[f"mixtures.{number}"]
            own = scale * s.own(query, key)
            mixed = scale * (mixtures @ s.views[query].to(mixtures.dtype)[..., None])[..., 0]
            mixed = mixed.masked_fill(~s.prepared[f"made.{number}"][:, None], -torch.inf)
            lse = torch.cat([own[:, None], s["rest", query][:, None], mixed], 1).logsumexp(1)
            terms.append(Term(lse - own, s.valid(query, key), 1 / self.directions))
        return terms
