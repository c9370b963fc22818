"""NNCLR: the positive of a sample is the other view of its nearest neighbour among earlier samples.

    n(a_i) = the element of the queue most similar to a_i (no gradient)
    L      = [ InfoNCE(n(a), b) + InfoNCE(n(b), a) ] / 2,  anchors n(.) against the candidates of the global batch

Dwibedi et al. 2021, "With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual
Representations". The queue holds the first view of earlier batches; until it holds any, samples are their
own neighbours. Neighbours across clips and modalities (CrossCLR) are the same with other views; `all4one` reads several
neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.collectives import Workers
from cl.engine.exchange import ExchangeChoice, Exchanger
from cl.engine.outcome import Outcome
from cl.engine.sweep import Tiling
from cl.engine.symmetric import symmetric_infonce
from cl.memory.queue import Queue
from cl.objectives.base import OBJECTIVES, Objective
from cl.objectives.prototypes.neighbours import nearest
from cl.objectives.temperature import Temperature, TemperatureConfig
from cl.pairs import Pairs


class NNCLRConfig(TemperatureConfig):
    views: list[str] | None = Field(None, description="the two views; default: the batch's two views")
    queue: int = Field(98304, ge=1, description="earlier embeddings among which neighbours are sought")
    exchange: ExchangeChoice = Field("auto", description="how candidates of other workers are seen")
    tile_rows: int = Field(0, ge=0, description="anchors a tile; 0: by device")
    tile_columns: int = Field(0, ge=0, description="candidates a tile; 0: by device")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


@OBJECTIVES.register(
    "nnclr",
    "the positive is the nearest neighbour's other view, sought in a queue",
    paper="With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual Representations",
)
class NNCLR(Objective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = NNCLRConfig
    state = ("queue",)

    def __init__(self, config: NNCLRConfig) -> None:
        super().__init__()
        assert config.dimensions is not None
        self.views = config.views
        self.temperature = Temperature(config)
        self.exchanger = Exchanger(config.exchange)
        self.tiling = Tiling(config.tile_rows, config.tile_columns)
        self.queue = Queue(config.queue, config.dimensions)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        self.temperature.follow_(pairs.clock)
        first, second = self.views or list(pairs.views)[:2]
        views = {name: pairs.view(name) for name in (first, second)}
        weight = pairs.view_weights(first).where(pairs.view_weights(second) > 0, 0)
        layout = workers.layout(len(pairs), pairs.device)
        exchange = self.exchanger(layout.total, views[first].shape[1], views[first].element_size(), workers)
        losses = []
        for anchor, other in ((first, second), (second, first)):
            loss, _, _ = symmetric_infonce(
                nearest(self.queue, views[anchor], weight)[:, 0],
                views[other],
                self.temperature(),
                layout=layout,
                weight=weight,
                content=pairs.content_columns(),
                forward_share=1.0,
                exchange=exchange,
                tiling=self.tiling,
            )
            losses.append(loss / 2)
        if self.training and torch.is_grad_enabled():
            self.queue.push(views[first], None, weight, layout)
        return Outcome(losses[0] + losses[1], dict(self.measures()))

    def measures(self) -> Mapping[str, Tensor]:
        return {"logit_scale": self.temperature().detach()}

    def clamp_(self) -> None:
        self.temperature.clamp_()
