"""Local groups: a sample is read together with its nearest neighbours, and its group is contrasted as an instance is.

    g_i    = T( z_i, the k elements of the memory most similar to z_i )        of the towers in training
    g'_i   = T'( t_i, the k elements of the memory most similar to t_i )       of the teacher; T' follows T
    loss_i = logsumexp( l_i, <g_i, g'> / tau for g' in the queue ) - l_i,      l_i = <g_i, g'_i> / tau

Zhou et al. 2022, "Mugs: A Multi-Granular Self-Supervised Learning Framework", local-group supervision: T is a small
transformer, the memory holds the teacher's embeddings of earlier batches, the queue their groups g'. The group of one
view is found by that of the other as in `moco`, whose fields these are. The whole of Mugs (the shipped recipe `mugs`)
is a `sum` of three terms of equal weight, of an instance, its local group, and the group of a cluster:

    objective:
      name: sum
      terms:
        instance: {objective: {name: moco, direction: both, temperature: 0.2}}
        local-group: {objective: {name: local-group, direction: both, temperature: 0.2}}
        group: {objective: {name: dino}}

Needs the teacher's embeddings (`teachers` in the training config, kind ema): view x by teacher t is the view x_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.memory.queue import Queue
from cl.objectives.base import OBJECTIVES
from cl.objectives.moving import MovingAverage
from cl.objectives.prototypes.neighbours import NeighbourAttention, nearest
from cl.objectives.schedule import Scheduled, value_at
from cl.objectives.state.moco import MoCo, MoCoConfig
from cl.pairs import Pairs


class LocalGroupConfig(MoCoConfig):
    temperature: Scheduled = Field(0.2, description="scores are divided by it")
    memory: int = Field(65536, ge=1, description="the teacher's embeddings among which neighbours are sought")
    neighbours: int = Field(8, ge=1, description="k, how many are read together with a sample")
    layers: int = Field(2, ge=1, description="of the transformer T")
    heads: int = Field(8, ge=1, description="of the transformer T")
    momentum: Scheduled = Field(0.996, description="of the transformer's moving average; a number or a ramp")


@OBJECTIVES.register(
    "local-group",
    "momentum contrast of samples that are read together with their nearest neighbours (a term of Mugs)",
    paper="Mugs: A Multi-Granular Self-Supervised Learning Framework",
)
class LocalGroup(MoCo):
    """See the module's formula. Parameters: the transformer T."""

    Config = LocalGroupConfig
    state = ("queue", "the transformer's moving average")

    def __init__(self, config: LocalGroupConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None
        self.config = config
        self.attention = NeighbourAttention(config.dimensions, config.layers, config.heads)
        self.slow = MovingAverage(self.attention)
        self.known = Queue(config.memory, config.dimensions)

    def learnt(self) -> Sequence[Tensor]:
        """The temperature, if it is; the transformer makes the views, and gets its gradient through them."""
        return list(self.temperature.parameters())

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        if self.training:
            self.slow.follow(self.attention, value_at(self.config.momentum, pairs.clock))
        queries = self.queries(list(self.view_names or pairs.views))
        views = dict(pairs.views)
        for query, key in queries:
            views[query] = self.grouped(pairs, query, self.attention)
            views[key] = self.grouped(pairs, key, self.slow)
        outcome = super().forward(replace(pairs, views=views), workers)
        if self.training and torch.is_grad_enabled():
            key = queries[0][1]
            layout = workers.layout(len(pairs), pairs.device)
            self.known.push(pairs.view(key), None, pairs.view_weights(key), layout)
        return outcome

    def grouped(self, pairs: Pairs, name: str, attention: NeighbourAttention | MovingAverage) -> Tensor:
        """[B, D]: a view's samples, each read together with its neighbours."""
        weight = pairs.view_weights(name)
        rows = pairs.view(name).to(pairs.dtype).where((weight > 0)[:, None], 0)
        near = nearest(self.known, rows, weight, self.config.neighbours).to(rows.dtype)
        return unit(attention(torch.cat([rows[:, None], near], 1))).to(pairs.view(name).dtype)
