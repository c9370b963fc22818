"""The learning rate is that of open_clip's cosine schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl.training.config import ScheduleConfig
from cl.training.schedule import learning_rate


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (7, 50), (50, 50), (80, 50)])
def test_cosine_equals_open_clip(warmup: int, total: int) -> None:
    from open_clip_train.scheduler import cosine_lr

    weight = nn.Parameter(torch.zeros(1))
    theirs = torch.optim.SGD([weight], lr=0.3)
    scheduler = cosine_lr(theirs, 0.3, warmup, total)
    config = ScheduleConfig(warmup_steps=warmup)
    for step in range(1, total + 1):
        scheduler(step - 1)
        assert learning_rate(config, 0.3, step, total) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)


def test_rates_are_positive_and_never_above_the_peak() -> None:
    config = ScheduleConfig(warmup_steps=5, final_fraction=0.1)
    rates = [learning_rate(config, 2.0, step, 40) for step in range(1, 41)]
    assert max(rates) == 2.0
    assert 0.2 < rates[-1] < 0.21
    assert all(rate > 0 for rate in rates)
    assert learning_rate(ScheduleConfig(kind="constant"), 2.0, 40, 40) == 2.0
