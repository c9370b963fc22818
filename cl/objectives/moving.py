"""A moving average of a small network of an objective, such as the head of a teacher."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


class MovingAverage(nn.Module):
    """theta <- m theta + (1 - m) theta_followed; nobody trains it. Called as the network that it follows.

    It starts as a copy and follows at the beginning of each step, that is after the optimizer's last.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def follow(self, module: nn.Module, momentum: float) -> None:
        for slow, fast in zip(self.module.parameters(), module.parameters(), strict=True):
            slow.lerp_(fast.to(slow), 1 - momentum)

    @torch.no_grad()
    def forward(self, *arguments: Any) -> Any:
        return self.module(*arguments)
