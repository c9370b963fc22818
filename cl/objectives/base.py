"""What every objective is: a module that turns one step's `Pairs` into a loss, by the engine's gradient convention."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator
from torch import nn

from cl.config import Config, parse_config
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.pairs import Pairs
from cl.registry import Registry


class Objective(nn.Module):
    """Base of all objectives. A subclass sets `Config`, the pydantic model of its settings."""

    Config: type[Config]

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        raise TypeError(f"{type(self).__name__} must define forward(pairs, workers).")

    def clamp_(self) -> None:
        """Put the objective's own parameters back into their range; called after every optimizer step."""


OBJECTIVES: Registry[type[Objective]] = Registry("objective", package="cl.objectives", group="clew.objectives")


class ObjectiveConfig(Config, extra="allow"):
    """The `objective` section of a config: a registered `name` and that objective's own fields.

    The fields are validated against the objective's own model as soon as the config is read.
    """

    name: str = "infonce"

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"name": data}
        if not isinstance(data, dict):
            return data
        settings = _settings(data)
        return {"name": data.get("name", "infonce"), **settings.model_dump()}


def _settings(data: dict[str, Any]) -> Config:
    name = data.get("name", "infonce")
    fields = {key: value for key, value in data.items() if key != "name"}
    return parse_config(OBJECTIVES[name].Config, fields, where=f"objective {name!r}")


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a config describes."""
    cls: Any = OBJECTIVES[config.name]
    return cls(_settings(config.model_dump()))
