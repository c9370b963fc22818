"""What every objective is: a module that turns one step's `Pairs` into a loss, by the engine's gradient convention."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator
from torch import nn

from cl.config import Config, parse_config
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.errors import ConfigError
from cl.pairs import Pairs
from cl.registry import Registry


class Objective(nn.Module):
    """Base of all objectives.

    A subclass sets `Config`, the pydantic model of its settings, and says for the table of objectives what it needs.

    Attributes:
        compares: which embeddings; "any two views" is images with texts, images with images, texts with texts.
        needs: what the batch must hold beside those: "class labels", "negatives", "teacher views", ...
        state: what outlives a step and is in the checkpoint: "queue", "prototypes", ...
        memory: how memory grows; "batch x dim" for everything that is evaluated tile by tile.
    """

    Config: type[Config]
    compares: ClassVar[str] = "any two views"
    needs: ClassVar[tuple[str, ...]] = ()
    state: ClassVar[tuple[str, ...]] = ()
    memory: ClassVar[str] = "batch x dim"

    @classmethod
    def build(cls, config: Any, dimensions: int | None) -> Objective:
        """An instance; the field `dimensions`, where the config has one, is filled in if it is empty."""
        if "dimensions" in type(config).model_fields and config.dimensions is None:
            if dimensions is None:
                raise ConfigError(f"{cls.__name__} needs the field dimensions: the size of the embeddings.")
            config = config.model_copy(update={"dimensions": dimensions})
        return cls(config)

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


def build_objective(config: ObjectiveConfig, dimensions: int | None = None) -> Objective:
    """The objective that a config describes.

    Args:
        config: name and settings.
        dimensions: those of the embeddings, for objectives with weights of that size (prototypes, predictors) whose
            config does not say.

    Raises:
        ConfigError: the objective needs to know the dimensions, and nobody says.
    """
    return OBJECTIVES[config.name].build(_settings(config.model_dump()), dimensions)
