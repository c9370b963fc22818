"""SogCLR and FastCLIP v0, v1, v3: the estimated global contrastive loss with one temperature.

With g, u, eps as in `cl.objectives.state.estimator`:

    sogclr      tau constant, gamma constant
    fastclip-v1 tau constant, gamma by the cosine
    fastclip-v0 tau learnt by the gradient of the same, unscaled loss
    fastclip-v3 loss = sg(tau) mean_i [g_i / (eps + u_i)] / 2 + tau (rho + mean_i log(eps + u_i) / 2)   both directions

Yuan et al. 2022, "Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm
Performance"; Wei et al. 2024, "FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP Training with Limited
Resources" (halved: there both directions are summed and the penalty is 2 rho).

`temperature_rule` of v3: by the paper, d/dtau = rho + mean log(eps + u) / 2 + tau mean (d g / d tau) / (eps + u) / 2.
The authors' code counts the last part twice, as g is computed from the side of its rows and from that of its columns,
and has log u without eps. The values of rho that were published (6.5, 8.5 and 16 for 3, 12 and 400 million pairs)
belong to the code's rule. The published runs give the temperature a learning rate of its own, 2e-4 to 5e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Samples, Term, Tile
from cl.objectives.base import OBJECTIVES
from cl.objectives.state.estimator import EstimatorConfig, GlobalContrastive
from cl.objectives.tiled import ScaledConfig, ScaledObjective

_FASTCLIP = "FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP Training with Limited Resources"


class FastCLIPConfig(EstimatorConfig, ScaledConfig):
    """The estimator's fields and those of one temperature."""


class ConstantTemperatureConfig(FastCLIPConfig):
    temperature: float = Field(0.03, gt=0, description="scores are divided by it")
    learn_temperature: bool = Field(False, description="train the log of the inverse temperature")


class SogCLRConfig(ConstantTemperatureConfig):
    gamma: float = Field(0.8, gt=0, le=1, description="share of the new value in the moving average")
    gamma_schedule: Literal["cosine", "constant"] = Field(
        "constant", description="cosine: from 1 in the first epoch down to gamma; constant: gamma"
    )


class FastCLIPv3Config(FastCLIPConfig):
    rho: float = Field(6.5, ge=0, description="penalty on the temperature; larger for larger corpora")
    temperature_rule: Literal["paper", "code"] = Field(
        "code", description="gradient of the temperature: as published, or as in the authors' code (rho fits the code)"
    )


@OBJECTIVES.register(
    "fastclip-v0", "the estimated global contrastive loss, temperature learnt with it", paper=_FASTCLIP
)
class FastCLIPv0(GlobalContrastive, ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = FastCLIPConfig

    def scale(self) -> Tensor:
        """What multiplies scores."""
        return self.temperature()

    def logits(self, t: Tile) -> tuple[Tensor, Tensor]:
        logits = self.scale() * t.scores
        return logits, logits

    def positive(self, s: Samples, view: str) -> Tensor:
        return self.scale() * s.own(*self.compared)


@OBJECTIVES.register(
    "fastclip-v1", "the estimated global contrastive loss, constant temperature, gamma falls", paper=_FASTCLIP
)
class FastCLIPv1(FastCLIPv0):
    """See the module's formula."""

    Config = ConstantTemperatureConfig


@OBJECTIVES.register(
    "sogclr",
    "the global contrastive loss with denominators estimated by moving averages for each sample",
    paper="Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm Performance",
)
class SogCLR(FastCLIPv0):
    """See the module's formula."""

    Config = SogCLRConfig


@OBJECTIVES.register(
    "fastclip-v3",
    "the estimated robust global contrastive loss, one temperature learnt with a penalty",
    paper=_FASTCLIP,
)
class FastCLIPv3(FastCLIPv0):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = FastCLIPv3Config

    def __init__(self, config: FastCLIPv3Config) -> None:
        super().__init__(config)
        self.rho, self.twice = config.rho, config.temperature_rule == "code"

    def scale(self) -> Tensor:
        scale = self.temperature()
        return 2 * scale - scale.detach() if self.twice else scale

    def finish(self, s: Samples) -> list[Term]:
        tau = 1 / self.temperature()
        valid = s.prepared["valid"]
        contrast = [Term(tau.detach() * term.values, term.valid, term.factor) for term in super().finish(s)]
        log_u = torch.stack([self._log_u(s.prepared, number) for number in range(2)]).mean(0)
        return [*contrast, Term(tau * (self.rho + log_u), valid)]

    def _log_u(self, values: Mapping[str, Tensor], number: int) -> Tensor:
        return values[f"log_u.{number}"] if self.twice else self.log_mean_u(values, number)
