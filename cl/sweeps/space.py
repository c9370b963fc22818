"""Which settings are tried: a list of them for grid and random search, a distribution for Optuna."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np

from cl.sweeps.config import Axis, SweepConfig

Parameters = dict[str, Any]  # field of the training config -> value


def listed(cfg: SweepConfig) -> list[Parameters]:
    """The settings of a grid or of a random search, the same for the same config; no setting twice."""
    if cfg.searcher == "grid":
        choices = [axis.choice or [] for axis in cfg.space.values()]
        grid = [dict(zip(cfg.space, values, strict=True)) for values in itertools.product(*choices)]
        return grid[: cfg.trials]
    assert cfg.trials is not None
    rng = np.random.default_rng(cfg.seed)
    found: dict[str, Parameters] = {}
    draws = 0
    # A small space may hold fewer settings than trials are asked for.
    while len(found) < cfg.trials and draws < 100 * cfg.trials:
        drawn = {path: draw(axis, rng) for path, axis in cfg.space.items()}
        found.setdefault(json.dumps(drawn, sort_keys=True), drawn)
        draws += 1
    return list(found.values())


def draw(axis: Axis, rng: np.random.Generator) -> Any:
    """One value of an axis."""
    if axis.choice is not None:
        return axis.choice[int(rng.integers(len(axis.choice)))]
    if axis.integer is not None:
        return int(rng.integers(axis.integer[0], axis.integer[1] + 1))
    if axis.uniform is not None:
        return float(rng.uniform(*axis.uniform))
    assert axis.loguniform is not None
    return math.exp(rng.uniform(math.log(axis.loguniform[0]), math.log(axis.loguniform[1])))


def distributions(cfg: SweepConfig) -> dict[str, Any]:
    """The space as Optuna's distributions."""
    from optuna import distributions as optuna

    made: dict[str, Any] = {}
    for path, axis in cfg.space.items():
        if axis.choice is not None:
            made[path] = optuna.CategoricalDistribution(axis.choice)
        elif axis.integer is not None:
            made[path] = optuna.IntDistribution(*axis.integer)
        elif axis.uniform is not None:
            made[path] = optuna.FloatDistribution(*axis.uniform)
        else:
            assert axis.loguniform is not None
            made[path] = optuna.FloatDistribution(*axis.loguniform, log=True)
    return made


def first(cfg: SweepConfig) -> Parameters:
    """One setting of the space, to check a sweep with before it starts."""
    return {path: draw(axis, np.random.default_rng(cfg.seed)) for path, axis in cfg.space.items()}


def words(parameters: Parameters) -> list[str]:
    """Settings as the overrides that the command line takes."""
    return [f"{path}={json.dumps(value)}" for path, value in parameters.items()]
