"""Hashing: any objective on codes that are nearly binary.

    h = tanh(beta W e),   L = L_inner(normalise h) + q mean_i |abs(h_i) - 1|^2 / K + d |mean_i h_i|^2 / K

Codes for search by Hamming distance are sign(W e). beta grows over the run (Cao et al. 2017, "HashNet: Deep Learning to
Hash by Continuation"), q pulls entries to -1 and 1 (Liu et al. 2016, "Deep Supervised Hashing for Fast
Image Retrieval"), d balances each bit over the global batch. Affinity-prompted hashing (PromptHash) puts its own
contrast inside.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from cl.config import Config
from cl.engine import moments
from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES, Objective, ObjectiveConfig, build_objective
from cl.objectives.schedule import Scheduled, value_at
from cl.pairs import Pairs


class HashingConfig(Config):
    objective: ObjectiveConfig = Field(description="the objective on codes")
    bits: int = Field(64, ge=1, description="K, length of the codes")
    sharpness: Scheduled = Field(1.0, description="beta, a number or a ramp")
    quantisation: float = Field(0.1, ge=0, description="q, weight of the distance to binary codes")
    balance: float = Field(0.1, ge=0, description="d, weight of each bit's mean")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


@OBJECTIVES.register(
    "hashing",
    "any objective on nearly binary codes, with quantisation and bit balance",
    paper="HashNet: Deep Learning to Hash by Continuation",
)
class Hashing(Objective):
    """See the module's formula. Parameters: W, shared by all views."""

    Config = HashingConfig
    compares = "what the inner objective compares"
    needs = ("what the inner objective needs",)

    def __init__(self, config: HashingConfig, inner: Objective) -> None:
        super().__init__()
        assert config.dimensions is not None
        self.config, self.inner = config, inner
        self.project = nn.Linear(config.dimensions, config.bits, bias=False)

    @classmethod
    def build(cls, config: Any, dimensions: int | None) -> Hashing:
        return cls(
            config.model_copy(update={"dimensions": config.dimensions or dimensions}),
            build_objective(config.objective, config.bits),
        )

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        sharpness = value_at(self.config.sharpness, pairs.clock)
        codes, penalties = {}, []
        for name, view in pairs.views.items():
            weight = pairs.view_weights(name)
            rows = view.to(weight.dtype).where((weight > 0)[:, None], 0)
            code = torch.tanh(sharpness * self.project(rows))
            penalties.append(self._penalty(code, weight, workers))
            codes[name] = unit(code)
        outcome = self.inner(replace(pairs, views=codes), workers)
        penalty = moments.replicated(torch.stack(penalties).mean(), workers)
        return Outcome(outcome.loss + penalty, {**outcome.metrics, "binary_penalty": penalty.detach()})

    def _penalty(self, code: Tensor, weight: Tensor, workers: Workers) -> Tensor:
        rough = moments.mean((code.abs() - 1).square().mean(1, keepdim=True), weight, workers)[0]
        lean = moments.mean(code, weight, workers).square().mean()
        return self.config.quantisation * rough + self.config.balance * lean

    def clamp_(self) -> None:
        self.inner.clamp_()
