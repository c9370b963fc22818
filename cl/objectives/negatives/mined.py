"""Mined negatives with weights beside those of the batch.

    loss_i = log( sum_j e^{l_ij} + m sum_k w_k e^{<a_i, n_k> / tau} ) - l_ii

n_k are mined negatives (`extra`), of the anchor alone (`shared: false`) or of all samples of all workers; w_k are their
weights in the batch (a miner's confidence), m is one weight for all. Karpukhin et al. 2020, "Dense Passage Retrieval
for Open-Domain Question Answering" (shared, m = 1). One whose content is the anchor's is left out.
"""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import ScaledConfig, ScaledObjective


class MinedConfig(ScaledConfig):
    extra: list[str] = Field(["negatives"], description="the mined negatives, by name")
    mined_weight: float = Field(1.0, gt=0, description="weight m of mined negatives beside the batch's")
    shared: bool = Field(True, description="mined negatives of one sample are negatives of all samples")


@OBJECTIVES.register(
    "mined-negatives",
    "softmax over the batch and mined negatives with weights",
    paper="Dense Passage Retrieval for Open-Domain Question Answering",
)
class MinedNegatives(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = MinedConfig
    needs: ClassVar[tuple[str, ...]] = ("negatives",)

    def __init__(self, config: MinedConfig) -> None:
        super().__init__(config)
        self.log_weight, self.shared = math.log(config.mined_weight), config.shared

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        if t.column_view not in self.extra:
            return {"lse": row_lse(logits)}
        weight = t.columns.weight.to(logits)
        logits = logits + (self.log_weight + weight.where(weight > 0, 1).log())
        return {"lse": row_lse(logits, mask=None if self.shared else t.own)}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        return [Term(s["lse", first] - self.temperature() * s.own(first, second), s.valid(first, second))]
