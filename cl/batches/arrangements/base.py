"""What every arrangement is, and the `arrange` section of a training config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, model_validator

from cl.config import Config, parse_config
from cl.registry import Registry


class NoSettings(Config):
    """An arrangement without settings of its own."""


class Arrangement(ABC):
    """Deals the samples of a pool of steps out among these steps. It must be a function of its arguments alone.

    Attributes:
        Config: the pydantic model of its settings.
        keys: how many columns it compares; None: any number.
    """

    Config: ClassVar[type[Config]] = NoSettings
    keys: ClassVar[int | None] = 1

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def deal(self, keys: np.ndarray, home: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
        """The step of each sample.

        Args:
            keys: [n, K] int64, what the columns hold; equal numbers mean equal values.
            home: [n] int64, the step that a sample is in without the arrangement, in ascending order.
            sizes: [steps] int64, how many samples each step must get; they sum to n.
            seed: fixes whatever is drawn, another in each pool.

        Returns:
            [n] int64, of which sizes[t] are t.
        """


ARRANGEMENTS: Registry[type[Arrangement]] = Registry("arrangement", "cl.batches.arrangements", "clew.arrangements")


class ArrangeConfig(Config, extra="allow"):
    """A registered arrangement and its own settings, which are checked as soon as the config is read."""

    name: str = Field(description="as `clew arrangements` lists them")
    by: list[str] | None = Field(
        None,
        min_length=1,
        description="what is compared: fields of the corpus (by what they hold), columns, or meta.FIELD; "
        "null: all fields",
    )
    pool: int = Field(16, ge=2, description="steps whose samples are dealt out among them")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        """`arrange: NAME` is short for `arrange: {name: NAME}`, and `by` may be a single name."""
        if isinstance(data, str):
            return {"name": data}
        if isinstance(data, dict) and isinstance(data.get("by"), str):
            return {**data, "by": [data["by"]]}
        return data

    @model_validator(mode="after")
    def _settings_fit(self) -> ArrangeConfig:
        build_arrangement(self)
        count = ARRANGEMENTS[self.name].keys
        if count is not None and len(self.by or []) != count:
            raise ValueError(f"arrange: {self.name} needs `by` to name {count} column, not {len(self.by or [])}")
        return self


def build_arrangement(config: ArrangeConfig) -> Arrangement:
    """The arrangement that a config names.

    Raises:
        ConfigError: there is none of that name, or a setting that it does not have.
    """
    cls = ARRANGEMENTS[config.name]
    return cls(parse_config(cls.Config, config.model_extra or {}, where=f"arrangement {config.name!r}"))


def fill(step: np.ndarray, home: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Place the samples that have no step yet (-1): at home where there is room, the others wherever there is.

    Args:
        step, home: [n] int64.
        room: [steps] int64, how many each step has yet to get.
    """
    step, room = step.copy(), room.copy()
    for at in range(len(room)):
        waiting = np.flatnonzero((step < 0) & (home == at))[: room[at]]
        step[waiting] = at
        room[at] -= len(waiting)
    step[step < 0] = np.repeat(np.arange(len(room)), room)
    return step
