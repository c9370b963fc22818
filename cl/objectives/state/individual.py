"""FastCLIP v2 and iSogCLR: the estimated global contrastive loss with a temperature for each sample and direction.

With l_ij = <a_i, b_j> / tau_i, d_ij = l_ij - l_ii and g, u, eps as in `cl.objectives.state.estimator`:

    loss      = mean_i [ g_i / (eps + u_i) over both directions ] / 2             to the embeddings
    d tau_i   = log(eps + u_i) + rho - mean_{j != i} e^{d_ij} d_ij / (eps + u_i)   clamped to +-5
    adam      tau_i by Adam on d tau_i; betas are 0 in the first epoch, bias is corrected by epoch + 1
    momentum  m_i <- (1 - beta) m_i + beta d tau_i,  tau_i <- tau_i - eta m_i

tau_i is kept in [tau_min, tau_max], and moves after the step's loss. Qiu et al. 2023, "Not All Semantics are Created
Equal: Contrastive Self-supervised Learning with Automatic Temperature Individualization" (momentum);
Wei et al. 2024, "FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP Training with Limited Resources", v2
(adam). The published code keeps e^{-b} u with a running maximum b of d_ij, against overflow; here u is a logarithm and
needs none. The gradients of rows of one sample in the same batch are averaged before the clamp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Tile, column_mean, row_mean
from cl.memory.table import Visit
from cl.objectives.base import OBJECTIVES
from cl.objectives.state.estimator import EstimatorConfig, GlobalContrastive

_CLAMP = 5.0
_BETAS = (0.9, 0.999)
_ADAM_EPSILON = 1e-8


class IndividualConfig(EstimatorConfig):
    tau: float = Field(0.03, gt=0, description="initial temperature of each sample")
    tau_min: float = Field(0.01, gt=0, description="smallest temperature of a sample")
    tau_max: float = Field(1.0, gt=0, description="largest temperature of a sample")
    rho: float = Field(7.0, ge=0, description="penalty on the temperatures")
    temperature_rule: Literal["adam", "momentum"] = Field("adam", description="how the temperatures move")
    temperature_lr: float = Field(0.0133, ge=0, description="learning rate of the temperatures")
    temperature_beta: float = Field(0.9, gt=0, le=1, description="momentum: share of the new gradient")

    @model_validator(mode="after")
    def _in_range(self) -> IndividualConfig:
        if not self.tau_min <= self.tau <= self.tau_max:
            raise ValueError(f"tau must lie between tau_min {self.tau_min} and tau_max {self.tau_max}")
        return self


class ISogCLRConfig(IndividualConfig):
    gamma: float = Field(0.8, gt=0, le=1, description="share of the new value in the moving average")
    gamma_schedule: Literal["cosine", "constant"] = Field(
        "constant", description="cosine: from 1 in the first epoch down to gamma; constant: gamma"
    )
    tau: float = Field(0.07, gt=0, description="initial temperature of each sample")
    tau_min: float = Field(0.005, gt=0, description="smallest temperature of a sample")
    rho: float = Field(6.0, ge=0, description="penalty on the temperatures")
    temperature_rule: Literal["adam", "momentum"] = Field("momentum", description="how the temperatures move")
    temperature_lr: float = Field(0.01, ge=0, description="learning rate of the temperatures")


@OBJECTIVES.register(
    "fastclip-v2",
    "the estimated robust global contrastive loss, a temperature for each sample, moved by Adam",
    paper="FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP Training with Limited Resources",
)
class FastCLIPv2(GlobalContrastive):
    """See the module's formula."""

    Config = IndividualConfig
    config: IndividualConfig

    def kept(self) -> Mapping[str, float]:
        return {**super().kept(), "tau": self.config.tau, "m": 0.0, "v": 0.0}

    def labels(self) -> list[str]:
        return ["tau.0", "tau.1"]

    def logits(self, t: Tile) -> tuple[Tensor, Tensor]:
        row, column = self.compared.index(t.row_view), self.compared.index(t.column_view)
        return t.scores / t.row(f"tau.{row}"), t.scores / t.column(f"tau.{column}")

    def positive(self, s: Samples, view: str) -> Tensor:
        return s.own(*self.compared) / s.meta[f"tau.{self.compared.index(view)}"]

    def tile(self, t: Tile) -> Reductions:
        rows, columns = (logits.detach() for logits in self.logits(t))
        drift = self.both(t, row_mean(rows, rows, "negatives"), column_mean(columns, columns, "negatives"))
        return {**super().tile(t), "drift": drift}

    def move(self, s: Samples, new: Mapping[str, Tensor], valid: Tensor, visit: Visit) -> Mapping[str, Tensor]:
        moved: dict[str, Tensor] = {}
        for number, view in enumerate(self.compared):
            log_mean_u = self.log_mean_u(new, number)
            distance = s["drift", view] - self.positive(s, view)
            slope = log_mean_u + self.config.rho - (self.log_g(s, view) - log_mean_u).exp() * distance
            slope = visit.mean(slope, valid).clamp(-_CLAMP, _CLAMP)
            old = {name: s.meta[f"{name}.{number}"] for name in ("tau", "m", "v")}
            for name, value in self._stepped(old, slope, s.clock.epoch).items():
                moved[f"{name}.{number}"] = value
        return moved

    def _stepped(self, old: Mapping[str, Tensor], slope: Tensor, epoch: int) -> dict[str, Tensor]:
        """tau, m and v after a step."""
        config = self.config
        if config.temperature_rule == "momentum":
            m, v = (1 - config.temperature_beta) * old["m"] + config.temperature_beta * slope, old["v"]
            step = m
        else:
            first, second = _BETAS if epoch > 0 else (0.0, 0.0)
            m, v = first * old["m"] + (1 - first) * slope, second * old["v"] + (1 - second) * slope**2
            step = m / (1 - first ** (epoch + 1)) / ((v / (1 - second ** (epoch + 1))).sqrt() + _ADAM_EPSILON)
        tau = (old["tau"] - config.temperature_lr * step).clamp(config.tau_min, config.tau_max)
        return {"tau": tau, "m": m, "v": v}


@OBJECTIVES.register(
    "isogclr",
    "SogCLR with a temperature for each sample, moved with momentum",
    paper="Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic Temperature "
    "Individualization",
)
class ISogCLR(FastCLIPv2):
    """See the module's formula."""

    Config = ISogCLRConfig
