"""DCLR: a complementary model masks false negatives, and noise that was moved towards the anchors is further negatives.

    loss_i = log( e^{l_ii} + sum_{j != i, q_ij < phi} e^{l_ij} + sum_m e^{<a_i, u_m> / tau} ) - l_ii
    u_m    = z_m / |z_m|,  z_m ~ N(0, sigma^2), then t times  z_m <- z_m + eta g_m / |g_m|
    g_m    = d / d z_m  mean_i logsumexp_m <a_i, u_m> / tau_u

l_ij = <a_i, b_j> / tau, and q are the scores of a frozen model. Zhou et al. 2022, "Debiased Contrastive Learning of
Unsupervised Sentence Representations": g is the gradient of the non-uniformity loss, and the noise gets no
gradient from the loss. The noise is the same on all workers; its gradient is over the anchors of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cl.engine import randomness
from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.engine.rule import Comparison, Reductions, Samples, Term, Tile, row_lse
from cl.engine.side import Side
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs

_CHUNK = 1024  # anchors at a time


class DCLRConfig(ScaledConfig):
    temperature: Scheduled = Field(0.05, description="initial temperature; scores are divided by it")
    threshold: float = Field(0.9, description="score (cosine) of the other model from which a candidate is no negative")
    teacher: str | None = Field(
        "teacher", description="name t of the other model, whose embeddings of view x are the view x_t; null: no mask"
    )
    noise: int = Field(256, ge=0, description="noise negatives, vectors shared by all anchors")
    deviation: float = Field(1.0, gt=0, description="standard deviation of the noise, sigma")
    noise_steps: int = Field(4, ge=0, description="steps by which the noise is moved, t")
    noise_rate: float = Field(1e-3, ge=0, description="length of such a step, eta")
    noise_temperature: float = Field(0.05, gt=0, description="temperature of the non-uniformity loss, tau_u")
    seed: int = Field(0, description="of the noise")


@OBJECTIVES.register(
    "dclr",
    "another model masks false negatives; noise moved towards the anchors is further negatives",
    paper="Debiased Contrastive Learning of Unsupervised Sentence Representations",
)
class DCLR(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = DCLRConfig
    needs: ClassVar[tuple[str, ...]] = ("teacher views",)

    def __init__(self, config: DCLRConfig) -> None:
        super().__init__(config)
        self.config = config
        self._noise: Tensor | None = None
        if config.teacher is not None and self.view_names is not None:
            self.view_names = [*self.view_names, *(f"{view}_{config.teacher}" for view in self.view_names)]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str] | Comparison]:
        first, second = views[:2]
        teacher = self.config.teacher
        channels = {} if teacher is None else {"teacher": (f"{first}_{teacher}", f"{second}_{teacher}")}
        found: list[tuple[str, str] | Comparison] = [Comparison(first, second, channels)]
        return [*found, *((first, name) for name in self.extra), *([(first, "noise")] if self.config.noise else [])]

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        anchors = pairs.view(next(iter(self.view_names or pairs.views))).detach()
        anchors = anchors.to(pairs.dtype).where((pairs.weights() > 0)[:, None], 0)
        if self.config.noise:
            self._noise = self._moved(self._drawn(pairs, anchors.shape[1]), anchors, pairs.weights(), workers)
        outcome = super().forward(pairs, workers)
        self._noise = None
        return outcome

    def _drawn(self, pairs: Pairs, dimensions: int) -> Tensor:
        rows = torch.arange(self.config.noise, device=pairs.device)[:, None]
        columns = torch.arange(dimensions, device=pairs.device)
        noise = randomness.normal(self.config.seed, pairs.clock.step, rows, columns, dtype=pairs.dtype)
        return self.config.deviation * noise

    def _moved(self, noise: Tensor, anchors: Tensor, weight: Tensor, workers: Workers) -> Tensor:
        """Unit vectors [M, D] after the steps."""
        tau = self.config.noise_temperature
        share = weight / workers.all_reduce(weight.sum()).clamp_min(1e-30)
        for _ in range(self.config.noise_steps):
            length = noise.norm(dim=1, keepdim=True)
            direction = noise / length
            slope = torch.zeros_like(noise)
            for rows, part in zip(anchors.split(_CHUNK), share.split(_CHUNK), strict=True):
                chance = (rows @ direction.T / tau).softmax(1)
                slope += (part[:, None] * chance).T @ rows / tau
            workers.all_reduce(slope)
            slope = (slope - (slope * direction).sum(1, keepdim=True) * direction) / length
            noise = noise + self.config.noise_rate * unit(slope)
        return unit(noise)

    def constants(self, pairs: Pairs) -> list[Side]:
        if self._noise is None:
            return []
        count = len(self._noise)
        nobody = torch.full((count,), -1, device=pairs.device)
        weight = self._noise.new_ones(count)
        return [Side("noise", self._noise, nobody, weight, role="negative", replicated=True)]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        if "teacher" not in t.channels:
            return {"lse": row_lse(logits)}
        return {"lse": row_lse(logits, mask=(t.channels["teacher"] < self.config.threshold) | t.own)}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        return [Term(s["lse", first] - self.temperature() * s.own(first, second), s.valid(first, second))]
