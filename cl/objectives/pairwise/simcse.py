"""SimCSE: InfoNCE of sentences, with a weight on the anchor's own mined negative; and PromCSE's hinge beside it.

    loss_i = log sum_j [ e(a_i, c_j) + alpha^[i = j] e(a_i, n_j) ] - l_ii,   e(x, y) = exp(<x, y> / tau)

Gao et al. 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", eq. 1 (no mined negatives n: the second
view is the same sentence under other dropout) and 5 (n are contradictions), with the appendix's weight alpha.

PromCSE adds weight max(0, margin - <a_i, c_i> + max of <a_i, .> over all other candidates and mined negatives).

Jiang, Zhang and Wang 2022, "Improved Universal Sentence Embeddings with Prompt-based Contrastive Learning and
Energy-based Learning", with the negative cosine for the energy. The prompt is the encoder's business.
"""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Tile, row_lse, row_top
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.tiled import ScaledConfig, ScaledObjective


class SimCSEConfig(ScaledConfig):
    temperature: Scheduled = Field(0.05, description="initial temperature; scores are divided by it")
    own_negative_weight: float = Field(1.0, gt=0, description="alpha, weight of the anchor's own mined negatives")


@OBJECTIVES.register(
    "simcse",
    "InfoNCE of anchors against candidates, with a weight on the anchor's own mined negatives",
    paper="SimCSE: Simple Contrastive Learning of Sentence Embeddings",
)
class SimCSE(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = SimCSEConfig

    def __init__(self, config: SimCSEConfig) -> None:
        super().__init__(config)
        self.own_negative = math.log(config.own_negative_weight)

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        if self.own_negative and t.columns.role == "negative":
            logits = logits.where(~t.own, logits + self.own_negative)
        return {"lse": row_lse(logits)}

    def finish(self, s: Samples) -> Tensor:
        first, second = list(s.views)[:2]
        return s["lse", first] - self.temperature() * s.own(first, second)


class PromCSEConfig(SimCSEConfig):
    margin: float = Field(0.2, ge=0, le=2, description="how far the own pair must lie above the hardest negative")
    hinge_weight: float = Field(10.0, ge=0, description="weight of the hinge")


@OBJECTIVES.register(
    "promcse",
    "SimCSE and a hinge between the own pair and the hardest negative (energy-based learning)",
    paper="Improved Universal Sentence Embeddings with Prompt-based Contrastive Learning and Energy-based Learning",
)
class PromCSE(SimCSE):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = PromCSEConfig

    def __init__(self, config: PromCSEConfig) -> None:
        super().__init__(config)
        self.margin, self.weight = config.margin, config.hinge_weight

    def tile(self, t: Tile) -> Reductions:
        return {**super().tile(t), "hardest": row_top(t.scores, 1)}

    def finish(self, s: Samples) -> Tensor:
        first, second = list(s.views)[:2]
        # Without any negative the hardest is -inf, and the hinge 0.
        hinge = (self.margin - s.own(first, second) + s["hardest", first][:, 0]).relu()
        return super().finish(s) + self.weight * hinge
