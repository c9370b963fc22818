"""Margin softmax: a cosine classifier over learnt class vectors whose own class must win by a margin.

    cosface:  loss_i = -log( exp s (cos t_y - m) / ( exp s (cos t_y - m) + sum_{c != y} exp s cos t_c ) )
    arcface:  the same with cos(t_y + m) in the place of cos t_y - m

cos t_c = <z_i, w_c> for class vectors of length 1. Wang et al. 2018, "CosFace: Large Margin Cosine Loss for Deep Face
Recognition", eq. 4; Deng et al. 2019, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", eq. 3. Where
t_y + m passes pi, ArcFace goes on with cos t_y - m sin m, which keeps falling, as the authors' program does.
Embeddings of all views count, normalised or not by the model. With m = 0 both are the normalised softmax.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.labelled import each_anchor
from cl.objectives.supervised.proxies import ProxyConfig, ProxyObjective


class MarginConfig(ProxyConfig):
    per_class: int = Field(1, ge=1, le=1, description="one vector a class")
    scale: float = Field(64.0, gt=0, description="s, the inverse temperature")
    margin: float = Field(0.35, ge=0, description="m, of the cosine")


@OBJECTIVES.register(
    "cosface",
    "a cosine classifier over learnt class vectors with a margin on the own class's cosine",
    paper="CosFace: Large Margin Cosine Loss for Deep Face Recognition",
)
class CosFace(ProxyObjective):
    """See the module's formula. Parameters: class vectors [classes, D]."""

    Config = MarginConfig

    def __init__(self, config: MarginConfig) -> None:
        super().__init__(config)
        self.scale, self.margin = config.scale, config.margin

    def harder(self, cosine: Tensor) -> Tensor:
        """The own class's cosine with the margin taken off."""
        return cosine - self.margin

    def tile(self, t: Tile) -> Reductions:
        own = self.positives(t)
        logits = self.scale * torch.where(own, self.harder(t.scores), t.scores)
        return {"all": row_lse(logits), "own": row_lse(logits, mask=own)}

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            return s["all", view] - s["own", view], s["own", view].isfinite()

        return each_anchor(s, loss)


class ArcFaceConfig(MarginConfig):
    margin: float = Field(0.5, ge=0, lt=math.pi, description="m, of the angle in radians")


@OBJECTIVES.register(
    "arcface",
    "a cosine classifier over learnt class vectors with a margin on the own class's angle",
    paper="ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
)
class ArcFace(CosFace):
    """See the module's formula. Parameters: class vectors [classes, D]."""

    Config = ArcFaceConfig

    def harder(self, cosine: Tensor) -> Tensor:
        square = 1 - cosine.square()
        alive = square > torch.finfo(cosine.dtype).eps  # at 0 and pi the sine has no slope
        sine = torch.where(alive, square.where(alive, 1).sqrt(), 0)
        turned = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        return torch.where(cosine > -math.cos(self.margin), turned, cosine - self.margin * math.sin(self.margin))
