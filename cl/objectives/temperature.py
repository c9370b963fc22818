"""A learnable, clamped temperature, kept as the log of its inverse (the logit scale)."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from cl.config import Config


class TemperatureConfig(Config):
    """Fields shared by objectives with one global temperature."""

    temperature: float = Field(0.07, gt=0, description="initial temperature; scores are divided by it")
    learn_temperature: bool = Field(True, description="train the log of the inverse temperature")
    max_scale: float = Field(100.0, gt=0, description="largest inverse temperature, kept after each step")


class Temperature(nn.Module):
    """exp(log_scale) multiplies similarities; log_scale is a parameter, or a buffer when it is not trained."""

    log_scale: Tensor

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        self.max_log_scale = math.log(config.max_scale)
        initial = torch.tensor(min(-math.log(config.temperature), self.max_log_scale))
        if config.learn_temperature:
            self.log_scale = nn.Parameter(initial)
        else:
            self.register_buffer("log_scale", initial)

    def forward(self) -> Tensor:
        """The inverse temperature, 0-d."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the scale in [1, max_scale] (Radford et al. 2021, section 2.5, clip at 100)."""
        self.log_scale.clamp_(min(0.0, self.max_log_scale), self.max_log_scale)
