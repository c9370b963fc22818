"""Temperatures: learnt and clamped, with a bias, by side, by sample, scheduled, following the model; all in a sweep."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from cl.config import load_config, parse_config
from cl.engine.collectives import Workers
from cl.errors import ConfigError
from cl.objectives import OBJECTIVES, ObjectiveConfig, build_objective
from cl.objectives.schedule import Ramp
from cl.objectives.temperature import TemperatureConfig
from cl.pairs import Clock, Pairs
from cl.sweeps import space
from cl.sweeps.config import SweepConfig
from cl.training.config import TrainConfig
from tests.distributed.references import REFERENCES
from tests.unit.test_objectives_laws import batch_of

WIDTH = 6
TEMPERED = [
    entry.name
    for entry in OBJECTIVES.entries()
    if issubclass(entry.value.Config, TemperatureConfig)
    and entry.value.Config.model_fields["temperature"].annotation == float | Ramp
]


def objective(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return build_objective(ObjectiveConfig.model_validate({"name": name, **fields}), WIDTH).double()


def apart() -> Pairs:
    """Own pairs far from each other, all others equal: any optimizer wants another temperature."""
    eye = torch.eye(WIDTH, dtype=torch.float64)
    return Pairs({"a": eye, "b": eye.roll(1, 0)})


def scale(of: Any) -> float:
    return float(of.temperature().detach())


def test_a_learnt_temperature_moves_and_stays_in_its_range() -> None:
    of = objective("infonce", temperature=0.02, max_scale=50)
    assert scale(of) == pytest.approx(50)  # 1 / 0.02 is the greatest scale
    optimizer = torch.optim.SGD(of.parameters(), lr=1e6)
    for sign, expected in ((1, 1.0), (-1, 50.0)):  # down to 1, and up to max_scale
        optimizer.zero_grad()
        (sign * of(apart(), Workers()).loss).backward()
        optimizer.step()
        of.clamp_()
        assert scale(of) == pytest.approx(expected)


def test_a_constant_temperature_has_no_parameter() -> None:
    assert not list(objective("infonce", learn_temperature=False).parameters())


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 0.4), ("cosine", 0.5 - 0.4 * (1 - math.sqrt(0.5)) / 2)])
def test_a_scheduled_temperature_follows_the_run_and_is_not_learnt(shape: str, quarter: float) -> None:
    of = objective("infonce", temperature={"start": 0.5, "end": 0.1, "shape": shape})
    assert not list(of.parameters())
    for step, expected in ((0, 0.5), (25, quarter), (50, 0.3), (100, 0.1)):
        found = of(replace(apart(), clock=Clock(step, 100)), Workers())
        assert float(found.metrics["logit_scale"]) == pytest.approx(1 / expected, rel=1e-6)


@pytest.mark.parametrize("name", TEMPERED)
def test_every_objective_with_a_temperature_takes_a_schedule(name: str) -> None:
    """At a step between, the loss is that of the temperature of this step."""
    pairs = replace(batch_of(name), clock=Clock(1, 4, 0, 2))
    settings = {key: value for key, value in REFERENCES[name].settings[0].items() if "temperature" not in key}
    losses = []
    for temperature in ({"start": 0.5, "end": 0.1}, 0.4):
        of = objective(name, **settings, temperature=temperature, learn_temperature=False)
        losses.append(float(of(pairs, Workers()).loss.detach()))
        assert scale(of) == pytest.approx(2.5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_each_side_learns_a_temperature_of_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    views = [torch.nn.functional.normalize(torch.randn(5, WIDTH, generator=generator).double()) for _ in range(2)]
    of = objective("infonce-per-side", temperature=0.1, second_temperature=0.2)
    of(Pairs(dict(zip("ab", views, strict=True))), Workers()).loss.backward()
    assert scale(of) == pytest.approx(10)
    assert float(of.second().detach()) == pytest.approx(5)
    assert of.temperature.log_scale.grad != of.second.log_scale.grad
    ramp = objective("infonce-per-side", second_temperature={"start": 0.4, "end": 0.1})
    assert [name for name, _ in ramp.named_parameters()] == ["temperature.log_scale"]


def test_each_sample_has_a_temperature_between_the_bounds() -> None:
    of, rows = objective("infonce-per-sample", least=0.05, greatest=0.5), torch.randn(40, WIDTH).double()
    of.predict[0].weight.data.mul_(50)
    found = of._tau(of.predict[0], rows).detach()
    assert 0.05 <= float(found.min()) < 0.1
    assert 0.4 < float(found.max()) <= 0.5
    with pytest.raises(ConfigError, match=r"least \(0.5\) must not be more than greatest \(0.1\)"):
        objective("infonce-per-sample", least=0.5, greatest=0.1)


def test_a_temperature_follows_the_alignment_of_the_model() -> None:
    eye = torch.eye(WIDTH, dtype=torch.float64)
    of = objective("macl", temperature=0.1, alpha=0.5)
    for second, expected in ((eye, 0.1 * 1.5), (eye.roll(1, 0), 0.1), (-eye, 0.1 * 0.5)):
        metrics = of(Pairs({"a": eye, "b": second}), Workers()).metrics
        assert float(metrics["logit_scale"]) == pytest.approx(1 / expected, rel=1e-6)


def test_a_bias_is_learnt_beside_the_temperature() -> None:
    of = objective("siglip", bias=-3.0)
    of(apart(), Workers()).loss.backward()
    assert {name for name, _ in of.named_parameters()} == {"bias", "temperature.log_scale"}
    assert all(parameter.grad != 0 for parameter in of.parameters())
    assert dict(objective("siglip", learn_bias=False).named_parameters()).keys() == {"temperature.log_scale"}


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("infonce", {"temperature": [0.05, {"start": 0.2, "end": 0.05, "shape": "cosine"}]}),
    ("infonce", {"learn_temperature": [True, False], "max_scale": [50, 100]}),
    ("siglip", {"bias": [-10, -5], "learn_bias": [True, False]}),
    ("infonce-per-side", {"second_temperature": [0.05, 0.1]}),
    ("infonce-per-sample", {"rho": [4, 8], "greatest": [0.1, 0.2]}),
    ("isogclr", {"tau": [0.03, 0.05]}),
    ("macl", {"alpha": [0.0, 0.5], "expected_alignment": [0.0, 0.2]}),
]


@pytest.mark.parametrize(
    ("name", "choices"), KINDS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_every_kind_is_an_axis_of_a_sweep(name: str, choices: dict[str, list[Any]]) -> None:
    axes = {f"objective.{field}": {"choice": values} for field, values in choices.items()}
    fields = {"base": "sample-clip", "samples": 10, "validation": {"val": "x"}, "out": "out", "space": axes}
    trials = space.listed(parse_config(SweepConfig, fields, "sweep"))
    assert len(trials) == math.prod(len(values) for values in choices.values())
    for trial in trials:
        words = [f"{path}={value}" for path, value in trial.items()]
        config = load_config(TrainConfig, "train", "sample-clip", [f"objective={{name: {name}}}", *words])
        found = config.objective.model_dump()
        for path, value in trial.items():
            field = path.removeprefix("objective.")
            assert found[field] == ({**found[field], **value} if isinstance(value, dict) else value)
