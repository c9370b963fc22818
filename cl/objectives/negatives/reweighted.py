"""Debiased and hard-weighted negatives: a softmax whose negatives are corrected for wrong ones and tilted to hard ones.

With l_ij = s_ij / tau, n negatives of an anchor, prior tau+ that a negative is a positive after all, hardness beta:

    h_i    = sum_j w_ij e^{l_ij} / n,   w_ij = n e^{beta l_ij} / sum_k e^{beta l_ik}      (beta = 0: the mean)
    g_i    = max{ (h_i - tau+ e^{l_ii}) / (1 - tau+),  e^{-1 / tau} }
    loss_i = log( alpha e^{l_ii} + n g_i ) - l_ii

    debiased  beta = 0, alpha = 1   Chuang et al. 2020, "Debiased Contrastive Learning"
    hcl       alpha = 1             Robinson et al. 2021, "Contrastive Learning with Hard Negative Samples"
    diht      tau+ = 0, no maximum  Radenovic et al. 2023, "Filtering, Distillation, and Hard Negatives for
                                    Vision-Language Pre-Training" (importance sampling of negatives)

e^{-1/tau} is the least that a cosine can give. Chuang and Robinson take negatives of both views, `same_side: true`.
Everything is computed on logarithms, so no temperature overflows. An anchor without negatives has no loss.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.negatives.sides import Sides, SidesConfig


class ReweightedConfig(SidesConfig):
    tau_plus: float = Field(0.1, ge=0, lt=1, description="prior probability that a negative is a positive, tau+")
    beta: float = Field(1.0, ge=0, description="weight of hard negatives; 0: all alike")
    alpha: float = Field(1.0, gt=0, le=1, description="weight of the positive in the sum over candidates")
    floor: bool = Field(True, description="keep the corrected mean above e^(-1 / temperature), the least possible")


class DebiasedConfig(ReweightedConfig):
    same_side: bool = Field(True, description="candidates of the anchor's own view count as well (two pictures)")
    beta: float = Field(0.0, ge=0, description="weight of hard negatives; 0: all alike")


class HCLConfig(ReweightedConfig):
    same_side: bool = Field(True, description="candidates of the anchor's own view count as well (two pictures)")


class DiHTConfig(ReweightedConfig):
    tau_plus: float = Field(0.0, ge=0, lt=1, description="prior probability that a negative is a positive, tau+")
    beta: float = Field(0.25, ge=0, description="weight of hard negatives; 0: all alike")
    alpha: float = Field(0.999, gt=0, le=1, description="weight of the positive in the sum over candidates")
    floor: bool = Field(False, description="keep the corrected mean above e^(-1 / temperature), the least possible")


class Reweighted(Sides):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    def __init__(self, config: ReweightedConfig) -> None:
        super().__init__(config)
        self.prior, self.beta, self.floor = config.tau_plus, config.beta, config.floor
        self.log_alpha = math.log(config.alpha)

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        hard = (1 + self.beta) * logits
        found = {
            "hard": self.ways(t, row_lse(hard, "negatives"), column_lse(hard, "negatives")),
            "count": self.count(t),
        }
        if self.beta:
            tilt = self.beta * logits
            found["tilt"] = self.ways(t, row_lse(tilt, "negatives"), column_lse(tilt, "negatives"))
        return found

    def finish(self, s: Samples) -> list[Term]:
        own = self.positive(s)
        losses, valid = [], []
        for view in self.anchors(s):
            some = s["count", view] > 0
            log_count = s["count", view].clamp_min(1).log()
            log_h = s["hard", view] - (s["tilt", view] if self.beta else log_count)
            log_g = self._corrected(log_h.where(some, 0), own)
            losses.append(torch.logaddexp(own + self.log_alpha, log_g + log_count) - own)
            valid.append(some)
        return self.mean(s, losses, valid)

    def _corrected(self, log_h: Tensor, own: Tensor) -> Tensor:
        """log g."""
        if self.prior:
            # log(h - tau+ e^own) where that is positive; elsewhere the floor, or nothing, counts
            excess = math.log(self.prior) + own - log_h
            right = excess < 0
            rest = (-torch.expm1(excess.where(right, -1.0))).log()
            log_h = (log_h + rest).where(right, -torch.inf) - math.log1p(-self.prior)
        return torch.maximum(log_h, -self.temperature()) if self.floor else log_h


@OBJECTIVES.register(
    "debiased", "negatives corrected for the prior that they are positives", paper="Debiased Contrastive Learning"
)
class Debiased(Reweighted):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = DebiasedConfig


@OBJECTIVES.register(
    "hcl",
    "hard negatives weigh more, corrected for the prior that they are positives",
    paper="Contrastive Learning with Hard Negative Samples",
)
class HCL(Reweighted):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = HCLConfig


@OBJECTIVES.register(
    "diht",
    "importance-sampled negatives, both directions",
    paper="Filtering, Distillation, and Hard Negatives for Vision-Language Pre-Training",
)
class DiHT(Reweighted):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = DiHTConfig
