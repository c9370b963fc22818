"""SigLIP: every pair is a binary choice.

    loss_i = sum_j -log sigmoid(z_ij (t <a_i, c_j> + b)),  z_ij = 1 for the own pair, -1 for others

Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", algorithm 1: t starts at 10, b at -10, both are
learnt. The sum over j is not averaged; the mean over i is. Pairs of equal content are left out.

Two views that all samples have take the fused path; further embeddings (`extra`) and missing modalities take the
general one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from cl.engine.collectives import Workers
from cl.engine.rule import Reductions, Samples, Tile, row_sum
from cl.engine.sigmoid import sigmoid_loss
from cl.objectives.base import OBJECTIVES, Outcome
from cl.objectives.schedule import Scheduled
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class SigLIPConfig(ScaledConfig):
    temperature: Scheduled = Field(0.1, description="initial temperature; scores are divided by it")
    bias: float = Field(-10.0, description="initial bias of the logits")
    learn_bias: bool = Field(True, description="train the bias")


@OBJECTIVES.register(
    "siglip",
    "a binary choice for every pair: sigmoid instead of softmax, with a learnt bias",
    paper="Sigmoid Loss for Language Image Pre-Training",
)
class SigLIP(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature, and the bias."""

    Config = SigLIPConfig
    bias: Tensor

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__(config)
        bias = torch.tensor(config.bias)
        if config.learn_bias:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        self.temperature.follow_(pairs.clock)
        anchors, candidates = (pairs.view(name) for name in pairs.two_views(self.view_names))
        if self.extra or pairs.present or anchors.dim() > 2 or candidates.dim() > 2:
            return super().forward(pairs, workers)
        layout = workers.layout(len(pairs), pairs.device)
        loss = sigmoid_loss(
            anchors,
            candidates,
            self.temperature(),
            self.bias,
            layout=layout,
            weight=pairs.weights(),
            content=pairs.content_columns(),
            exchange=self.exchanger(layout.total, anchors.shape[1], anchors.element_size(), workers),
            tiling=self.tiling,
        )
        return Outcome(loss, dict(self.measures()))

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores + self.bias
        return {"loss": row_sum(softplus(torch.where(t.own, -logits, logits)))}

    def finish(self, s: Samples) -> Tensor:
        return s["loss"]

    def measures(self) -> Mapping[str, Tensor]:
        return {**super().measures(), "logit_bias": self.bias.detach()}
