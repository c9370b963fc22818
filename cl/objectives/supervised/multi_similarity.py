"""Multi-similarity: hard positives and hard negatives, weighted by themselves and by each other.

    loss_i = 1/alpha log( 1 + sum_{p in P(i)} exp(-alpha (s_ip - base)) )
           + 1/beta  log( 1 + sum_{n in N(i)} exp( beta  (s_in - base)) ),                         s_ij = <z_i, z_j>

Wang et al. 2019, "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning". With
`epsilon`, pairs are mined first: a negative stays if it is more alike than the least similar positive - epsilon, a
positive if it is less alike than the most similar negative + epsilon. Without negatives (or positives) nothing is
mined and the loss is 0. The mean is over all anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, Tiler, column_lse, column_top, row_lse, row_top
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.labelled import LabelledConfig, LabelledObjective, each_anchor


class MultiSimilarityConfig(LabelledConfig):
    alpha: float = Field(2.0, gt=0, description="sharpness on positives")
    beta: float = Field(50.0, gt=0, description="sharpness on negatives")
    base: float = Field(0.5, description="similarity that divides positives from negatives")
    epsilon: float | None = Field(0.1, description="slack of the mining of pairs; null: all pairs")


@OBJECTIVES.register(
    "multi-similarity",
    "hard positives and negatives mined and weighted by their similarities (metric learning)",
    paper="Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning",
)
class MultiSimilarity(LabelledObjective):
    """See the module's formula. No parameters."""

    Config = MultiSimilarityConfig
    stopped = frozenset({"far", "near"})

    def __init__(self, config: MultiSimilarityConfig) -> None:
        super().__init__(config)
        self.alpha, self.beta, self.base, self.epsilon = config.alpha, config.beta, config.base, config.epsilon

    def passes(self) -> Sequence[Tiler]:
        return [self.tile] if self.epsilon is None else [self.extremes, self.tile]

    def extremes(self, t: Tile) -> Reductions:
        """The least similar positive (negated) and the most similar negative of each anchor."""
        positives = self.positives(t)
        far, near = [row_top(-t.scores, 1, "candidates", positives)], [row_top(t.scores, 1, "candidates", ~positives)]
        if self.columns_are_anchors(t):
            far.append(column_top(-t.scores, 1, "candidates", positives))
            near.append(column_top(t.scores, 1, "candidates", ~positives))
        return {"far": far, "near": near}

    def tile(self, t: Tile) -> Reductions:
        positives = self.positives(t)
        pull, push = -self.alpha * (t.scores - self.base), self.beta * (t.scores - self.base)
        kept = self._kept(t, positives, t.row) if self.epsilon is not None else (positives, ~positives)
        found = {"pull": [row_lse(pull, mask=kept[0])], "push": [row_lse(push, mask=kept[1])]}
        if self.columns_are_anchors(t):
            kept = self._kept(t, positives, t.column) if self.epsilon is not None else (positives, ~positives)
            found["pull"].append(column_lse(pull, mask=kept[0]))
            found["push"].append(column_lse(push, mask=kept[1]))
        return found

    def _kept(self, t: Tile, positives: Tensor, of: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
        """[R, C] bool: the positives and the negatives that stay for the anchors on one side."""
        assert self.epsilon is not None
        scores, far, near = t.scores.detach(), -of("far")[..., 0], of("near")[..., 0]
        return positives & (scores < near + self.epsilon), ~positives & (scores > far - self.epsilon)

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            pull, push = s["pull", view], s["push", view]
            zero = torch.zeros_like(pull)
            both = torch.logaddexp(zero, pull) / self.alpha + torch.logaddexp(zero, push) / self.beta
            return both, torch.ones_like(pull, dtype=torch.bool)

        return each_anchor(s, loss)
