"""Spaces of sweeps: what is tried, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from cl.config import parse_config
from cl.errors import ConfigError
from cl.sweeps import space
from cl.sweeps.config import AshaConfig, SweepConfig
from cl.sweeps.result import TrialResult, ranked


def config(**fields: Any) -> SweepConfig:
    base = {"base": "x", "samples": 100, "validation": {"val": "somewhere"}, "out": "out"}
    return parse_config(SweepConfig, {**base, "space": {"batch_size": {"choice": [2, 4]}}, **fields}, "sweep")


def test_a_grid_is_every_combination_in_order() -> None:
    cfg = config(space={"objective.temperature": {"choice": [0.1, 0.2]}, "batch_size": {"choice": [2, 4]}})
    found = [(p["objective.temperature"], p["batch_size"]) for p in space.listed(cfg)]
    assert found == [(0.1, 2), (0.1, 4), (0.2, 2), (0.2, 4)]
    assert len(space.listed(cfg.model_copy(update={"trials": 3}))) == 3


def test_a_tree_and_dotted_names_are_the_same_space() -> None:
    tree = config(space={"objective": {"temperature": {"choice": [0.1]}}, "batch_size": {"choice": [2]}})
    assert list(tree.space) == ["objective.temperature", "batch_size"]


def test_random_settings_lie_in_their_ranges_and_never_repeat() -> None:
    axes = {
        "optimizer.lr": {"loguniform": [1e-5, 1e-1]},
        "clip_norm": {"uniform": [0.5, 2]},
        "batch_size": {"integer": [2, 3]},
    }
    cfg = config(space=axes, searcher="random", trials=200, seed=3)
    found = space.listed(cfg)
    assert len(found) == 200
    assert found == space.listed(cfg)
    assert found != space.listed(cfg.model_copy(update={"seed": 4}))
    rates = sorted(p["optimizer.lr"] for p in found)
    assert 1e-5 <= rates[0] < 1e-4
    assert 1e-2 < rates[-1] <= 1e-1
    assert 3e-4 < rates[100] < 3e-3  # the median in the middle of the logarithm
    assert all(0.5 <= p["clip_norm"] <= 2 for p in found)
    assert {p["batch_size"] for p in found} == {2, 3}

    small = config(searcher="random", trials=50)
    assert sorted(p["batch_size"] for p in space.listed(small)) == [2, 4]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": {"lr": {"choice": [1], "uniform": [0, 1]}}}, "exactly one of choice, uniform, loguniform, integer"),
        ({"space": {"lr": {"loguniform": [0, 1]}}}, "loguniform must start above 0"),
        ({"space": {"lr": {"uniform": [2, 1]}}}, "smaller to a larger number, not from 2.0 to 1.0"),
        ({"space": {"lr": {"uniform": [1, 2]}}}, r"a grid needs choices, but space.lr is a range: use searcher=random"),
        ({"space": {"lr": {"chioce": [1]}}}, "space"),
        ({"searcher": "random"}, "needs the number of trials"),
        ({"evaluations": 2, "scheduler": {"name": "asha", "grace": 3}}, r"grace must be at most evaluations \(2\)"),
        ({"out": "s3://bucket/sweep"}, "local or shared folder"),
    ],
)
def test_mistakes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_schedulers_by_name() -> None:
    assert config(scheduler="asha").scheduler == AshaConfig()
    assert config(scheduler="none").scheduler is None
    assert config(scheduler=None).scheduler is None


def test_optuna_has_a_distribution_for_each_axis() -> None:
    axes = {"a": {"choice": [1, "x"]}, "b": {"loguniform": [1, 10]}, "c": {"integer": [1, 3]}, "d": {"uniform": [0, 1]}}
    found = space.distributions(config(space=axes, searcher="optuna", trials=3))
    assert {name: type(each).__name__ for name, each in found.items()} == {
        "a": "CategoricalDistribution",
        "b": "FloatDistribution",
        "c": "IntDistribution",
        "d": "FloatDistribution",
    }
    assert found["b"].log
    assert not found["d"].log


def test_whole_budgets_rank_before_parts_of_them() -> None:
    def trial(name: str, status: str, value: float | None) -> TrialResult:
        return TrialResult.model_validate({"id": name, "parameters": {}, "status": status, "value": value})

    trials = [
        trial("low", "finished", 0.1),
        trial("early", "stopped", 0.9),
        trial("broken", "failed", None),
        trial("high", "finished", 0.2),
    ]
    assert [t.id for t in ranked(trials, "max")] == ["high", "low", "early", "broken"]
    assert [t.id for t in ranked(trials, "min")] == ["low", "high", "early", "broken"]
