"""Numbers that change over a run: weights of terms, temperatures, margins."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from cl.config import Config
from cl.pairs import Clock


class Ramp(Config):
    """From `start` to `end` over a part of the run, by a straight line, half a cosine or one step."""

    start: float = Field(description="value before `begin`")
    end: float = Field(description="value after `finish`")
    shape: Literal["linear", "cosine", "step"] = Field("linear", description="step: `end` from `finish` on")
    begin: float = Field(0.0, ge=0, le=1, description="part of the run at which the change begins")
    finish: float = Field(1.0, ge=0, le=1, description="part of the run at which it is complete")

    @model_validator(mode="after")
    def _ordered(self) -> Ramp:
        if self.begin > self.finish:
            raise ValueError(f"begin ({self.begin}) must not be after finish ({self.finish})")
        return self

    def at(self, clock: Clock) -> float:
        """The value at a step."""
        length = self.finish - self.begin
        over = clock.progress >= self.finish
        part = 1.0 if over else 0.0 if length == 0 else max(0.0, (clock.progress - self.begin) / length)
        if self.shape == "step":
            part = float(over)
        elif self.shape == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return self.start + (self.end - self.start) * part


Scheduled = float | Ramp


def value_at(value: Scheduled, clock: Clock) -> float:
    """A number that may change over the run, at a step."""
    return value.at(clock) if isinstance(value, Ramp) else value
