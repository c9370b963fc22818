"""The learning rate is that of open_clip's cosine schedule, and AdamW decays matrices only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl.objectives import ObjectiveConfig, build_objective
from cl.training.config import OptimizerConfig, ScheduleConfig
from cl.training.optimizer import build_optimizer, decay_groups
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


def test_norms_biases_and_temperature_do_not_decay() -> None:
    towers = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    model = nn.ModuleDict(
        {
            "towers": towers,
            "objective": build_objective(ObjectiveConfig.model_validate({"name": "infonce"})),
        }
    )
    towers[0].bias.requires_grad_(False)
    decayed, spared = decay_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(parameter)] for parameter in decayed] == ["towers.0.weight"]
    assert {names[id(parameter)] for parameter in spared} == {
        "objective.temperature.log_scale",
        "towers.1.bias",
        "towers.1.weight",
    }


def test_a_step_moves_only_the_decayed_when_gradients_are_zero() -> None:
    model = nn.Linear(2, 2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(OptimizerConfig(lr=0.1, weight_decay=0.5), model)
    optimizer.step()
    assert torch.allclose(model.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, before["bias"])
    assert all(group["fused"] for group in optimizer.param_groups)
