"""Spectral contrastive loss: a matrix factorisation of the graph of positive pairs.

    loss_i = -2 mu <a_i, b_i> + mu^2 mean_{j != i} <a_i, b_j>^2

HaoChen et al. 2021, "Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss". The paper's
embeddings lie in a ball of radius sqrt(mu); Clew's have length 1, and mu scales their products. The second term is a
mean over the samples of all workers; both directions share it.
"""

from __future__ import annotations

import torch
from pydantic import Field

from cl.engine.rule import Reductions, Samples, Term, Tile, row_sum
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import TiledConfig, TiledObjective


class SpectralConfig(TiledConfig):
    mu: float = Field(1.0, gt=0, description="square of the embeddings' length")


@OBJECTIVES.register(
    "spectral",
    "own pairs are pulled linearly, all others pushed by the square of their product",
    paper="Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss",
)
class Spectral(TiledObjective):
    """See the module's formula. It has no parameters."""

    Config = SpectralConfig

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__(config)
        self.mu = config.mu

    def tile(self, t: Tile) -> Reductions:
        return {
            "squares": row_sum((self.mu * t.scores).square(), over="negatives"),
            "count": row_sum(torch.ones_like(t.scores), over="negatives"),
        }

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        count = s["count"]
        return [Term(-2 * self.mu * s.own(first, second)), Term(s["squares"] / count.clamp_min(1), count > 0)]
