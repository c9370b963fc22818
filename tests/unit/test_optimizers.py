"""Rates and decays by name and depth, and every optimizer by its own rule."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cl.config import load_tree, parse_config
from cl.encoders import ModelConfig, build_model
from cl.errors import ConfigError
from cl.objectives import ObjectiveConfig, build_objective
from cl.training.optimizer import OptimizerConfig, build_optimizer, parameter_groups, set_learning_rate

NAMES = ["adamw", "lamb", "lars", "lion", "muon", "sgd"]


def clip() -> nn.ModuleDict:
    fields = load_tree("models", "tiny-clip")
    model = build_model(parse_config(ModelConfig, fields, "test"), seed=0)
    objective = build_objective(ObjectiveConfig.model_validate({"name": "infonce"}))
    return nn.ModuleDict({"model": model, "objective": objective})


def settings_of(config: OptimizerConfig, module: nn.Module) -> dict[str, tuple[float, float]]:
    """Name -> (rate at a rate of 1, decay); every trainable parameter once."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {}
    for group in parameter_groups(config, module):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group["lr_scale"], group["weight_decay"]
    assert found.keys() == {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return found


def test_norms_biases_and_temperature_do_not_decay() -> None:
    module = clip()
    frozen = next(iter(module.parameters())).requires_grad_(False)
    for name, (scale, decay) in settings_of(OptimizerConfig(weight_decay=0.3), module).items():
        parameter = module.get_parameter(name)
        assert parameter is not frozen
        assert (scale, decay) == (1.0, 0.3 if parameter.dim() >= 2 else 0.0)


def test_deeper_blocks_learn_slower() -> None:
    """Four blocks above the image's embeddings, three above the text's; projections and the objective are the top."""
    found = settings_of(OptimizerConfig(layer_decay=0.5), clip())
    scales = {name.removeprefix("model."): scale for name, (scale, _) in found.items()}
    assert scales["objective.temperature.log_scale"] == 1

    def of(part: str) -> set[float]:
        chosen = {scale for name, scale in scales.items() if part in name}
        assert chosen
        return chosen

    for tower, blocks in (("image", 4), ("text", 3)):
        for n in range(blocks):
            assert {
                s for name, s in scales.items() if name.startswith(f"towers.{tower}") and f"resblocks.{n}." in name
            } == {0.5 ** (blocks - n)}
        embedded = {
            s for name, s in scales.items() if name.startswith(f"towers.{tower}") and "positional_embedding" in name
        }
        assert embedded == {0.5 ** (blocks + 1)}
    assert of("ln_post") == of("ln_final") == of("text_projection") == {1}


def test_the_first_group_that_matches_counts() -> None:
    config = OptimizerConfig.model_validate(
        {
            "weight_decay": 0.1,
            "groups": [
                {"parameters": "*.log_scale", "lr_scale": 0.2, "weight_decay": 0.7},
                {"parameters": "objective.*", "lr_scale": 0.5},
                {"parameters": "*.ln_post.*", "lr_scale": 0},
            ],
        }
    )
    module = clip()
    with pytest.raises(ConfigError, match=r"objective\.\*"):
        parameter_groups(config, module)
    del config.groups[1]
    found = settings_of(config, module)
    assert found["objective.temperature.log_scale"] == (0.2, 0.7)
    assert {value for name, value in found.items() if "ln_post" in name} == {(0.0, 0.0)}
    optimizer = build_optimizer(config, module)
    set_learning_rate(optimizer, 3.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(module.get_parameter("objective.temperature.log_scale"))] == pytest.approx(0.6)


def test_a_setting_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ValidationError, match="momentum is not a setting of adamw"):
        OptimizerConfig.model_validate({"momentum": 0.5})
    with pytest.raises(ValidationError, match="eps is not a setting of lion"):
        OptimizerConfig.model_validate({"name": "lion", "eps": 1e-8})


def first_update(name: str, weight: Tensor, slope: Tensor, rate: float, decay: float, eps: float) -> Tensor:
    """The first step of each rule on one matrix, from the papers; the running means start at 0."""
    if name in ("adamw", "lamb"):
        update = slope / (slope.abs() + eps)  # m and v are unbiased: m = g, v = g^2
        if name == "adamw":
            return weight * (1 - rate * decay) - rate * update
        update = update + decay * weight
        return weight - rate * weight.norm() / update.norm() * update
    if name == "lars":
        trust = 0.001 * weight.norm() / (slope.norm() + decay * weight.norm())
        return weight - rate * trust * (slope + decay * weight)
    if name == "lion":
        return weight * (1 - rate * decay) - rate * slope.sign()
    assert name == "sgd"
    return weight - rate * (1 + 0.9) * (slope + decay * weight)  # Nesterov's momentum


@pytest.mark.parametrize("name", [name for name in NAMES if name != "muon"])
def test_the_first_step_is_the_papers(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(4, 3).double()
    linear.weight.data, linear.weight.grad = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).unbind()
    before, slope = linear.weight.detach().clone(), linear.weight.grad.clone()
    optimizer = build_optimizer(OptimizerConfig.model_validate({"name": name, "lr": 0.1, "weight_decay": 0.5}), linear)
    set_learning_rate(optimizer, 0.02)
    optimizer.step()
    expected = first_update(name, before, slope, 0.02, 0.5, 1e-6)
    assert torch.allclose(linear.weight, expected, rtol=1e-6, atol=1e-8)


def test_muon_moves_matrices_by_nearly_orthogonal_steps_and_the_rest_by_nadamw() -> None:
    module = nn.ModuleDict({"linear": nn.Linear(8, 8), "embed": nn.Embedding(8, 8)})
    for parameter in module.parameters():
        slope = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        parameter.grad = slope * torch.logspace(0, -1.5, 8)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = build_optimizer(OptimizerConfig.model_validate({"name": "muon", "lr": 0.1, "weight_decay": 0}), module)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    moved = {name: before[name] - parameter.detach() for name, parameter in module.named_parameters()}
    singular = torch.linalg.svdvals(moved["linear.weight"].float())
    assert singular.max() / singular.min() < 3  # of the gradient itself: over 20
    assert torch.linalg.cond(module["linear"].weight.grad) > 20
    for name in ("linear.bias", "embed.weight"):  # Nesterov's first step: 1 + beta_1 times the rate
        assert torch.allclose(moved[name].abs(), torch.full_like(moved[name], 0.19), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_from_its_saved_state(name: str) -> None:
    """Five steps, or two, saved and read without pickle, and three more: the same weights."""

    def steps(module: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for number in numbers:
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            (module(x) - x.flip(1)).square().mean().backward()
            set_learning_rate(optimizer, 1e-2)
            optimizer.step()

    def start() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
        return module, build_optimizer(OptimizerConfig.model_validate({"name": name}), module)

    whole, optimizer = start()
    steps(whole, optimizer, range(5))
    first, optimizer = start()
    steps(first, optimizer, range(2))
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    second, optimizer = start()
    second.load_state_dict(first.state_dict())
    optimizer.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    steps(second, optimizer, range(2, 5))
    for found, expected in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, expected)
