"""Wrong pairs known by their losses: InfoNCE whose pairs weigh what their loss so far says about them.

    l_i    = the pair's InfoNCE, mean over directions; h_i its last value, or its mean over all visits, by sample id
    loss   = mean_i p_i l_i                                                         weigh
    loss   = mean_i [ l_i + (1 - p_i) (l_ii - mean_j l_ij) over directions ]        soften: target p_i on the own pair,
                                                                                    the rest spread over all candidates
    noise-posterior     two Gaussians fitted to all h: p_i = P(component of the smaller mean | h_i). Huang et al. 2021,
                        "Learning with Noisy Correspondence for Cross-modal Matching"; Tao et al. 2024,
                        "NEVLP: Noise-Robust Framework for Efficient Vision-Language Pre-training" (soften)
    bad-pair-mining     mu, sigma of all h: p_i = exp(-(h_i - mu)^2 / 2 sigma^2) / (sigma sqrt(2 pi)), where h_i lies
                        below mu - b sigma (noisy) or above mu + b' sigma (faulty), else 1. Lan et al. 2024, "Towards
                        Enhancing Time Series Contrastive Learning: A Dynamic Bad Pair Mining Approach"

The fit is over the samples of all workers, at the first step of each epoch from `warmup_epochs` on; before that, and
for samples without history, p is 1. `posterior` names a label that holds p_i, and nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.rule import Reductions, Samples, Term, Tile, column_lse, column_sum, row_lse, row_sum
from cl.memory.table import SampleTable, Visit
from cl.objectives.base import OBJECTIVES
from cl.objectives.negatives.sides import Sides, SidesConfig
from cl.pairs import Pairs

_TRUST = "pair.trust"
_ROUNDS = 30


class HistoryConfig(SidesConfig):
    use: Literal["weigh", "soften"] = Field("weigh", description="p_i as the pair's weight, or as its target")
    average: Literal["last", "mean"] = Field("last", description="what is kept: the last loss, or the mean of all")
    warmup_epochs: int = Field(1, ge=1, description="epochs before pairs are doubted")
    posterior: str | None = Field(None, description="label that holds p_i; then no history is kept")


class LossHistory(Sides):
    """See the module's formula; a subclass says what p is. Parameters: the log of the inverse temperature."""

    needs: ClassVar[tuple[str, ...]] = ("ids",)
    state: ClassVar[tuple[str, ...]] = ("per-sample table",)
    numbers: ClassVar[int]  # that describe the losses of all samples
    described: Tensor
    epoch: Tensor

    def __init__(self, config: HistoryConfig) -> None:
        super().__init__(config)
        self.config = config
        self.table = SampleTable({"loss": 0.0, "visits": 0.0})
        self.register_buffer("described", torch.zeros(self.numbers, dtype=torch.float64))
        self.register_buffer("epoch", torch.tensor(-1))  # the one of the description
        self._visit: Visit | None = None

    def describe(self, losses: Tensor, workers: Workers) -> Tensor:
        """The numbers that describe the losses [n] of this worker's shard and those of the others."""
        raise TypeError(f"{type(self).__name__} must define describe(losses, workers).")

    def trust(self, losses: Tensor) -> Tensor:
        """p [B] of samples whose loss is known."""
        raise TypeError(f"{type(self).__name__} must define trust(losses).")

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        if self.config.posterior is not None:
            trust = pairs.label(self.config.posterior).to(pairs.dtype)
            return super().forward(replace(pairs, labels={**pairs.labels, _TRUST: trust}), workers)
        now = pairs.clock.epoch
        if now >= self.config.warmup_epochs and int(self.epoch) != now:
            self.described = self.describe(self.table.values[:, 0].double(), workers).to(self.described)
            self.epoch.fill_(now)
        self._visit = self.table.visit(pairs.ids, pairs.weights(), workers)
        loss, visits = self._visit.values["loss"], self._visit.values["visits"]
        trust = torch.ones_like(loss)
        if int(self.epoch) >= 0:
            trust = torch.where(visits > 0, self.trust(loss.double()).to(loss), trust)
        known = {_TRUST: trust, "pair.loss": loss, "pair.visits": visits}
        outcome = super().forward(replace(pairs, labels={**pairs.labels, **known}), workers)
        self._visit = None
        return outcome

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        found = {"lse": self.ways(t, row_lse(logits), column_lse(logits))}
        if self.config.use == "soften":
            ones = torch.ones_like(logits)
            found["sum"] = self.ways(t, row_sum(logits), column_sum(logits))
            found["candidates"] = self.ways(t, row_sum(ones), column_sum(ones))
        return found

    def prepare(self, s: Samples) -> Mapping[str, Tensor]:
        """Keep the losses of this step."""
        if self._visit is None:
            return {}
        own, valid = self.positive(s), s.valid(*list(s.views)[:2])
        losses = torch.stack([s["lse", view] - own for view in self.anchors(s)]).mean(0)
        loss, visits = self._visit.mean(losses, valid), s.meta["pair.visits"] + 1
        if self.config.average == "mean":
            loss = s.meta["pair.loss"] + (loss - s.meta["pair.loss"]) / visits
        self._visit.write({"loss": loss, "visits": visits}, valid)
        return {}

    def finish(self, s: Samples) -> list[Term]:
        own, trust = self.positive(s), s.meta[_TRUST]
        losses = []
        for view in self.anchors(s):
            loss = s["lse", view] - own
            if self.config.use == "weigh":
                losses.append(trust * loss)
            else:
                losses.append(loss + (1 - trust) * (own - s["sum", view] / s["candidates", view].clamp_min(1)))
        return self.mean(s, losses)


def moments(values: Tensor, workers: Workers) -> tuple[Tensor, Tensor]:
    """Mean and variance of the values [n] of all workers; zeros of none."""
    sums = workers.all_reduce(torch.stack([values.new_tensor(len(values)), values.sum()]))
    mean = sums[1] / sums[0].clamp_min(1)
    return mean, workers.all_reduce(((values - mean) ** 2).sum()) / sums[0].clamp_min(1)


@OBJECTIVES.register(
    "noise-posterior",
    "pairs weigh the probability that their loss is of the clean kind, by a mixture of two Gaussians",
    paper="Learning with Noisy Correspondence for Cross-modal Matching",
)
class NoisePosterior(LossHistory):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = HistoryConfig
    numbers = 6

    def describe(self, losses: Tensor, workers: Workers) -> Tensor:
        """Share, mean and variance of both components, by expectation maximisation from mu - sigma and mu + sigma."""
        mean, variance = moments(losses, workers)
        least = 1e-6 * variance + 1e-12
        spread = variance.sqrt()
        mixture = torch.stack(
            [
                torch.full((2,), 0.5).to(losses),
                torch.stack([mean - spread, mean + spread]),
                (variance + least).expand(2),
            ]
        )
        for _ in range(_ROUNDS):
            chance = self._log_chances(losses, mixture).softmax(1)
            distance = losses[:, None] - mean
            sums = torch.stack([chance.sum(0), (chance * distance).sum(0), (chance * distance**2).sum(0)])
            total, first, second = workers.all_reduce(sums)
            some = total.clamp_min(1e-12)
            mixture = torch.stack(
                [total / total.sum().clamp_min(1e-12), mean + first / some, second / some - (first / some) ** 2]
            )
            mixture[2].clamp_(min=float(least))
        return mixture.flatten()

    def trust(self, losses: Tensor) -> Tensor:
        mixture = self.described.double().view(3, 2)
        return self._log_chances(losses, mixture).softmax(1)[:, int(mixture[1].argmin())]

    @staticmethod
    def _log_chances(losses: Tensor, mixture: Tensor) -> Tensor:
        """[n, 2]: log share + log density, but for a constant."""
        share, mean, variance = mixture
        return share.clamp_min(1e-300).log() - variance.log() / 2 - (losses[:, None] - mean) ** 2 / (2 * variance)


class BadPairsConfig(HistoryConfig):
    average: Literal["last", "mean"] = Field("mean", description="what is kept: the last loss, or the mean of all")
    low: float = Field(3.0, ge=0, description="standard deviations below the mean from which a pair is noisy, b")
    high: float = Field(3.0, ge=0, description="standard deviations above the mean from which a pair is faulty, b'")


@OBJECTIVES.register(
    "bad-pair-mining",
    "pairs whose mean loss is far below or above all others' weigh less",
    paper="Towards Enhancing Time Series Contrastive Learning: A Dynamic Bad Pair Mining Approach",
)
class BadPairMining(LossHistory):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = BadPairsConfig
    numbers = 2

    def __init__(self, config: BadPairsConfig) -> None:
        super().__init__(config)
        self.low, self.high = config.low, config.high

    def describe(self, losses: Tensor, workers: Workers) -> Tensor:
        mean, variance = moments(losses, workers)
        return torch.stack([mean, variance.sqrt()])

    def trust(self, losses: Tensor) -> Tensor:
        mean, spread = self.described.double()
        spread = spread.clamp_min(1e-12)
        density = (-(((losses - mean) / spread) ** 2) / 2).exp() / (spread * math.sqrt(2 * math.pi))
        far = (losses < mean - self.low * spread) | (losses > mean + self.high * spread)
        return torch.where(far, density, 1.0)
