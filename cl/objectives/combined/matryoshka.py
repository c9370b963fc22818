"""Matryoshka representation learning: any objective on nested prefixes of the embeddings.

    L = sum_m w_m L_inner( normalise(e[:, :m]) )   for m in `sizes`

Kusupati et al. 2022, "Matryoshka Representation Learning", eq. 1. Each prefix is scaled to length 1 again, so that a
truncated embedding is compared as it will be in use. The inner objective is one and the same for all sizes; its
parameters (temperature) are shared.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cl.config import Config
from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.errors import ConfigError
from cl.objectives.base import OBJECTIVES, Objective, ObjectiveConfig, build_objective
from cl.pairs import Pairs


class MatryoshkaConfig(Config):
    objective: ObjectiveConfig = Field(description="the objective that each size is trained with")
    sizes: list[int] = Field(description="dimensions of the prefixes, growing; the last is usually the whole")
    weights: list[float] | None = Field(None, description="weight of each size; default: 1 each")

    @model_validator(mode="after")
    def _fit(self) -> MatryoshkaConfig:
        if not self.sizes or self.sizes[0] < 1 or any(a >= b for a, b in pairwise(self.sizes)):
            raise ValueError(f"sizes must be positive and grow, not {self.sizes}")
        if self.weights is not None and len(self.weights) != len(self.sizes):
            raise ValueError(f"weights must be one for each of the {len(self.sizes)} sizes, not {len(self.weights)}")
        return self


@OBJECTIVES.register(
    "matryoshka",
    "any objective on nested prefixes of the embeddings, so that they can be truncated",
    paper="Matryoshka Representation Learning",
)
class Matryoshka(Objective):
    """See the module's formula."""

    Config = MatryoshkaConfig
    compares = "what the inner objective compares"
    needs = ("what the inner objective needs",)
    state = ("that of the inner objective",)
    memory = "that of the inner objective"

    def __init__(self, config: MatryoshkaConfig, inner: Objective) -> None:
        super().__init__()
        self.sizes = config.sizes
        self.weights = config.weights or [1.0] * len(config.sizes)
        self.inner = inner
        if inner.state:
            raise ConfigError(
                f"Objective {config.objective.name!r} keeps state ({', '.join(inner.state)}), which matryoshka would "
                "update once for each size."
            )

    @classmethod
    def build(cls, config: Any, dimensions: int | None) -> Matryoshka:
        if dimensions is not None and config.sizes[-1] > dimensions:
            raise ConfigError(f"matryoshka: size {config.sizes[-1]} is more than the embeddings' {dimensions}.")
        return cls(config, build_objective(config.objective))

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        losses, metrics = [], {}
        for size, weight in zip(self.sizes, self.weights, strict=True):
            outcome = self.inner(_prefix(pairs, size), workers)
            losses.append(weight * outcome.loss)
            metrics[f"loss_{size}"] = outcome.loss.detach()
            metrics |= outcome.metrics
        return Outcome(torch.stack(losses).sum(), metrics)

    def clamp_(self) -> None:
        self.inner.clamp_()


def _prefix(pairs: Pairs, size: int) -> Pairs:
    """The batch with embeddings of the first `size` dimensions, of length 1; what masked samples hold is left out."""
    alive = pairs.weights() > 0

    def first(value: Tensor, keep: Tensor) -> Tensor:
        return unit(value[..., :size].where(keep.view(-1, *[1] * (value.dim() - 1)), 0))

    views = {name: first(value, alive) for name, value in pairs.views.items()}
    extra = {
        name: replace(each, embeddings=first(each.embeddings, alive[each.owner])) for name, each in pairs.extra.items()
    }
    return replace(pairs, views=views, extra=extra)
