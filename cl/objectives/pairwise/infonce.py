"""InfoNCE, in one direction or both.

    l_ij   = <a_i, c_j> / tau
    loss_i = f (logsumexp_j l_ij - l_ii) + (1 - f) (logsumexp_j l_ji - l_ii)

f = 1/2 is CLIP's symmetric loss (Radford et al. 2021, "Learning Transferable Visual Models From Natural
Language Supervision", fig. 3); f = 1 is InfoNCE of anchors against candidates (van den Oord et al. 2018,
"Representation Learning with Contrastive Predictive Coding", eq. 4). Candidates j run over the samples of all
workers; a candidate with the anchor's own content is left out of the sum.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from cl.engine.collectives import Workers
from cl.engine.exchange import ExchangeChoice, Exchanger
from cl.engine.sweep import Tiling
from cl.engine.symmetric import symmetric_infonce
from cl.objectives.base import OBJECTIVES, Objective, Outcome
from cl.objectives.temperature import Temperature, TemperatureConfig
from cl.pairs import Pairs


class InfoNCEConfig(TemperatureConfig):
    views: tuple[str, str] | None = Field(None, description="the two views to compare; default: the batch's two views")
    direction: Literal["both", "forward", "backward"] = Field("both", description="forward: first view against second")
    exchange: ExchangeChoice = Field(
        "auto", description="how candidates of other workers are seen; local: not at all; auto: by size and memory"
    )
    tile_rows: int = Field(0, ge=0, description="anchors a tile; 0: by device")
    tile_columns: int = Field(0, ge=0, description="candidates a tile; 0: by device")
    keep: int = Field(64, ge=0, description="MiB of scores kept from forward to backward; the rest is computed again")


@OBJECTIVES.register(
    "infonce",
    "softmax over all candidates, both directions or one (CLIP, NT-Xent across views)",
    paper="Learning Transferable Visual Models From Natural Language Supervision",
)
class InfoNCE(Objective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = InfoNCEConfig

    def __init__(self, config: InfoNCEConfig) -> None:
        super().__init__()
        self.config = config
        self.temperature = Temperature(config)
        self.forward_share = {"both": 0.5, "forward": 1.0, "backward": 0.0}[config.direction]
        self.exchanger = Exchanger(config.exchange)
        self.tiling = Tiling(config.tile_rows, config.tile_columns, config.keep)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        first, second = pairs.two_views(self.config.views)
        anchors, candidates = pairs.view(first), pairs.view(second)
        if self.forward_share == 0:
            anchors, candidates = candidates, anchors
        self.temperature.follow_(pairs.clock)
        scale = self.temperature()
        layout = workers.layout(len(pairs), anchors.device)
        # A sample that lacks a view takes no part, as if it were masked.
        weight = pairs.view_weights(first).where(pairs.view_weights(second) > 0, 0)
        loss, positive, row_lse = symmetric_infonce(
            anchors,
            candidates,
            scale,
            layout=layout,
            weight=weight,
            content=pairs.content_columns(),
            forward_share=self.forward_share or 1.0,
            exchange=self.exchanger(layout.total, anchors.shape[1], anchors.element_size(), workers),
            tiling=self.tiling,
        )
        # exp(positive - lse) is the probability that the model gives to the right candidate.
        right = ((positive - row_lse).exp() * weight).nan_to_num()
        sums = workers.all_reduce(torch.stack([right.sum(), weight.sum()]))
        return Outcome(
            loss, {"logit_scale": scale.detach(), "positive_probability": sums[0] / sums[1].clamp_min(1e-12)}
        )

    def clamp_(self) -> None:
        self.temperature.clamp_()
