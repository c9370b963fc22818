"""CoSENT and AnglE: of two scored pairs, the one with the higher label shall have the higher score.

    loss = log( 1 + sum over i, k with y_i > y_k of exp((s_k - s_i) / tau) ),   s_i = score of the pair (a_i, b_i)

CoSENT: Huang et al. 2024, "CoSENT: Consistent Sentence Embedding via Similarity Ranking", s the cosine. AnglE: Li and
Li 2024, "AnglE-optimized Text Embeddings": each embedding is a complex vector (first half real, second half imaginary),
and s = |Re q + Im q| of q = <a_i, b_i> / (|a_i| |b_i|), as in the authors' code. Pairs i, k run over the samples of all
workers. With weights w the term of i is multiplied by w_i / mean w: weights count for the pair that should win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from cl.engine.collectives import Workers
from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse, row_sum
from cl.objectives.base import OBJECTIVES, Outcome
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class CoSENTConfig(ScaledConfig):
    temperature: float = Field(0.05, gt=0, description="differences of scores are divided by it")
    learn_temperature: bool = Field(False, description="train the log of the inverse temperature")
    label: str = Field("score", description="label [B]: how alike the two sides of each pair are")


@OBJECTIVES.register(
    "cosent",
    "pairs with higher labels get higher cosines: a smooth maximum over all inversions",
    paper="CoSENT: Consistent Sentence Embedding via Similarity Ranking",
)
class CoSENT(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature, if it is trained."""

    Config = CoSENTConfig
    needs = ("numbers as labels",)

    def __init__(self, config: CoSENTConfig) -> None:
        super().__init__(config)
        self.label = config.label
        self.sources, self.view_names = config.views, None  # tiles compare scores

    def score(self, first: Tensor, second: Tensor) -> Tensor:
        """[B]: s of pairs of embeddings [B, D]."""
        return (first * second).sum(1)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        names = list(self.sources or pairs.views)[:2]
        present = torch.stack([pairs.view_weights(name) > 0 for name in names]).all(0)
        first, second = (pairs.view(name).to(pairs.dtype).where(present[:, None], 1) for name in names)
        score = self.score(first, second)
        one = torch.ones_like(score)
        # The difference s_k - s_i is the product of two vectors of two numbers.
        views = {"should win": torch.stack([one, -score], 1), "should lose": torch.stack([score, one], 1)}
        weight = pairs.weights() * present
        return super().forward(replace(pairs, views=views, weight=weight, present={}, tokens={}), workers)

    def labels(self) -> list[str]:
        return [self.label]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [("should win", "should lose")]

    def tile(self, t: Tile) -> Reductions:
        inverted = t.row(self.label) > t.column(self.label)
        return {
            "inversions": row_lse(self.temperature() * t.scores, over="all", mask=inverted),
            "samples": row_sum(torch.ones_like(t.scores), over="all"),
        }

    def finish(self, s: Samples) -> list[Term]:
        # A scale of 100 and scores that differ by 2 are beyond float32's exponential, not float64's.
        inversions = s["inversions", "should win"].double()
        some = inversions.isfinite()
        total = inversions.where(some, 0).exp().where(some, 0) * s["samples", "should win"]
        return [Term(total)]

    def combine(self, means: Tensor) -> Tensor:
        return means.sum().log1p()


@OBJECTIVES.register(
    "angle",
    "CoSENT on the difference of angles of complex embeddings",
    paper="AnglE-optimized Text Embeddings",
)
class AnglE(CoSENT):
    """See the module's formula. Parameters: the log of the inverse temperature, if it is trained."""

    def score(self, first: Tensor, second: Tensor) -> Tensor:
        even = [pad(x, (0, x.shape[1] % 2)).chunk(2, dim=1) for x in (first, second)]
        (a, b), (c, d) = even
        return ((a * c + b * d).sum(1) + (b * c - a * d).sum(1)).abs()
