"""Learning rate as a pure function of the step, so that it needs no state and resumes exactly.

    f(k) = k / W                                  for k <= W (warm-up over W steps)
    f(k) = m + (1 - m) (1 + cos(pi t)) / 2        t = (k - 1 - W) / (K - W), K the last step, m the final fraction

Steps count from 1, and the last one still learns: these are the rates of open_clip, whose steps count from 0.
"""

from __future__ import annotations

import math

from cl.training.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, step: int, total_steps: int) -> float:
    """The learning rate of a step (1 .. total_steps)."""
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.kind == "constant":
        return peak
    done = (step - 1 - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return peak * (config.final_fraction + (1 - config.final_fraction) * cosine)
