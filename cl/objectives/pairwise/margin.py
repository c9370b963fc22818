"""InfoNCE with a margin: the own pair must win by it.

    loss_i = -log e(m(s_ii)) / ( e(m(s_ii)) + sum_{j != i} e(s_ij) ),   e(x) = exp(x / tau),  s = <a, c> = cos(theta)

    additive        m(s) = s - margin
    angular         m(s) = cos(theta + margin)
    multiplicative  m(s) = (-1)^k cos(margin theta) - 2 k,  for theta in [k, k + 1] pi / margin

Additive: Yang et al. 2019, "Improving Multilingual Sentence Embedding using Bi-directional Dual Encoder with Additive
Margin Softmax" (LaBSE's loss). Angular: Zhang et al. 2022, "A Contrastive Framework for Learning Sentence
Representations from Pairwise and Triple-wise Perspective in Angular Space" (ArcCSE). Multiplicative: Liu et al. 2017,
"SphereFace: Deep Hypersphere Embedding for Face Recognition".

Both directions or one. NT-Xent-AM and NT-Xent-AAM take the candidates of both views: Lepage and Dehak 2023,
"Experimenting with Additive Margins for Contrastive Self-Supervised Speaker Verification". Where theta + margin passes
pi, cos(theta + margin) would rise again; it goes on as s - margin sin(margin), as ArcFace has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.pairwise.directed import DirectedConfig, DirectedObjective

_EDGE = 1e-6  # sin(theta) = sqrt(1 - s^2) has an infinite slope at s = 1


def additive(score: Tensor, margin: float) -> Tensor:
    return score - margin


def angular(score: Tensor, margin: float) -> Tensor:
    sine = (1 - score.square()).clamp_min(_EDGE).sqrt()
    turned = score * math.cos(margin) - sine * math.sin(margin)
    return torch.where(score > math.cos(math.pi - margin), turned, score - margin * math.sin(margin))


def multiplicative(score: Tensor, margin: float) -> Tensor:
    theta = score.clamp(-1 + _EDGE, 1 - _EDGE).acos()
    k = (margin * theta.detach() / math.pi).floor()
    return (1 - 2 * (k % 2)) * (margin * theta).cos() - 2 * k


MARGINS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "additive": additive,
    "angular": angular,
    "multiplicative": multiplicative,
}


class MarginConfig(DirectedConfig):
    kind: Literal["additive", "angular", "multiplicative"] = Field("additive", description="form of the margin")
    margin: float = Field(0.3, ge=0, description="size: of the cosine, in radians, or as a factor; 0, 0, 1: none")
    same_side: bool = Field(False, description="other samples of the anchor's own view are negatives too (NT-Xent)")


class MarginObjective(DirectedObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config: type[MarginConfig] = MarginConfig

    def __init__(self, config: MarginConfig) -> None:
        super().__init__(config)
        self.config = config

    def margined(self, score: Tensor) -> Tensor:
        """What the own pair's score counts for."""
        return MARGINS[self.config.kind](score, self.config.margin)

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        first, second = views[:2]
        sides = [(first, first), (second, second)] if self.config.same_side else []
        return [(first, second), *sides, *((first, name) for name in self.extra)]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores.where(~t.positive, self.margined(t.scores))
        return {"lse": row_lse(logits) if t.row_view == t.column_view else self.each(row_lse, logits)}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        positive = self.temperature() * self.margined(s.own(first, second))
        anchors = self.anchors(s)
        return [Term(s["lse", view] - positive, factor=1 / len(anchors)) for view in anchors]


@OBJECTIVES.register(
    "additive-margin",
    "InfoNCE in both directions with a margin subtracted from the own pair's cosine (LaBSE)",
    paper="Improving Multilingual Sentence Embedding using Bi-directional Dual Encoder with Additive Margin Softmax",
)
class AdditiveMargin(MarginObjective):
    """See the module's formula."""


class AngularMarginConfig(MarginConfig):
    kind: Literal["additive", "angular", "multiplicative"] = Field("angular", description="form of the margin")
    margin: float = Field(math.radians(10), ge=0, description="size, in radians; 0: none")


@OBJECTIVES.register(
    "angular-margin",
    "InfoNCE with a margin added to the own pair's angle (ArcCSE)",
    paper="A Contrastive Framework for Learning Sentence Representations from Pairwise and Triple-wise Perspective in "
    "Angular Space",
)
class AngularMargin(MarginObjective):
    """See the module's formula."""

    Config = AngularMarginConfig


class MultiplicativeMarginConfig(MarginConfig):
    kind: Literal["additive", "angular", "multiplicative"] = Field("multiplicative", description="form of the margin")
    margin: float = Field(2.0, ge=1, description="factor of the angle; 1: none")


@OBJECTIVES.register(
    "multiplicative-margin",
    "InfoNCE with the own pair's angle multiplied by a margin (SphereFace)",
    paper="SphereFace: Deep Hypersphere Embedding for Face Recognition",
)
class MultiplicativeMargin(MarginObjective):
    """See the module's formula."""

    Config = MultiplicativeMarginConfig


class NTXentMarginConfig(MarginConfig):
    margin: float = Field(0.1, ge=0, description="size: of the cosine, in radians, or as a factor; 0, 0, 1: none")
    same_side: bool = Field(True, description="other samples of the anchor's own view are negatives too (NT-Xent)")


@OBJECTIVES.register(
    "ntxent-am",
    "NT-Xent with an additive margin on the positive (kind: angular for NT-Xent-AAM)",
    paper="Experimenting with Additive Margins for Contrastive Self-Supervised Speaker Verification",
)
class NTXentMargin(MarginObjective):
    """See the module's formula."""

    Config = NTXentMarginConfig
