"""One temperature: learnt and clamped, constant, or scheduled; kept as the log of its inverse (the logit scale)."""

from __future__ import annotations

import math

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from cl.config import Config
from cl.objectives.schedule import Ramp, Scheduled
from cl.pairs import Clock


class TemperatureConfig(Config):
    """Fields shared by objectives with one global temperature."""

    temperature: Scheduled = Field(
        0.07, description="scores are divided by it; where it is learnt the initial value; a ramp is not learnt"
    )
    learn_temperature: bool = Field(True, description="train the log of the inverse temperature")
    max_scale: float = Field(100.0, gt=0, description="largest inverse temperature, kept after each step")

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: Scheduled) -> Scheduled:
        least = min(value.start, value.end) if isinstance(value, Ramp) else value
        if least <= 0:
            raise ValueError(f"a temperature must be greater than 0, not {least}")
        return value


class Temperature(nn.Module):
    """exp(log_scale) multiplies similarities; log_scale is a parameter, or a buffer when it is not trained."""

    log_scale: Tensor

    def __init__(self, config: TemperatureConfig) -> None:
        super().__init__()
        self.max_log_scale = math.log(config.max_scale)
        self.ramp = config.temperature if isinstance(config.temperature, Ramp) else None
        first = config.temperature.start if isinstance(config.temperature, Ramp) else config.temperature
        initial = torch.tensor(self._log_scale(first))
        if config.learn_temperature and self.ramp is None:
            self.log_scale = nn.Parameter(initial)
        else:
            self.register_buffer("log_scale", initial)

    def _log_scale(self, temperature: float) -> float:
        return min(-math.log(temperature), self.max_log_scale)

    def forward(self) -> Tensor:
        """The inverse temperature, 0-d."""
        return self.log_scale.exp()

    @torch.no_grad()
    def follow_(self, clock: Clock) -> None:
        """Take the value of the schedule, if there is one; called before each step."""
        if self.ramp is not None:
            self.log_scale.fill_(self._log_scale(self.ramp.at(clock)))

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the scale in [1, max_scale] (Radford et al. 2021, section 2.5, clip at 100)."""
        self.log_scale.clamp_(min(0.0, self.max_log_scale), self.max_log_scale)
