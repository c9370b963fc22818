"""Regression of pair scores: the cosine of a pair shall be its label.

    loss_i = error(g s_i + h - y_i),   s_i = <a_i, b_i>,   error(x) = x^2, |x|, or Huber's with a threshold of 1

Reimers and Gurevych 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks" (regression: g =
1, h = 0). With `affine` g and h are learnt, so that labels may have any range: Barkan et al. 2020, "Scalable Attentive
Sentence-Pair Modeling via Distilled Sentence Embedding", regresses the logits of a cross-encoder. It needs no
negatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from cl.engine.rule import Samples, Term, Tiler
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import TiledConfig, TiledObjective

ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda score, label: (score - label).square(),
    "absolute": lambda score, label: (score - label).abs(),
    "huber": lambda score, label: smooth_l1_loss(score, label, reduction="none"),
}


class RegressionConfig(TiledConfig):
    label: str = Field("score", description="label [B]: how alike the two sides of each pair are")
    error: Literal["squared", "absolute", "huber"] = Field("squared", description="of the difference")
    affine: bool = Field(False, description="learn a factor and an offset of the cosine")


@OBJECTIVES.register(
    "score-regression",
    "the cosine of a pair, or a learnt line of it, regressed on a label (Sentence-BERT, DSE)",
    paper="Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
)
class ScoreRegression(TiledObjective):
    """See the module's formula. Parameters with `affine`: the factor and the offset."""

    Config = RegressionConfig
    needs = ("scored pairs",)

    def __init__(self, config: RegressionConfig) -> None:
        super().__init__(config)
        self.label, self.error = config.label, ERRORS[config.error]
        self.factor = nn.Parameter(torch.ones(())) if config.affine else None
        self.offset = nn.Parameter(torch.zeros(())) if config.affine else None

    def labels(self) -> list[str]:
        return [self.label]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return []

    def passes(self) -> list[Tiler]:
        return []

    def finish(self, s: Samples) -> list[Term]:
        score = s.own(*list(s.views)[:2])
        if self.factor is not None and self.offset is not None:
            score = self.factor * score + self.offset
        return [Term(self.error(score, s.meta[self.label].to(score.dtype)))]
