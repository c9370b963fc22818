"""What a callback is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cl.config import Config, parse_config
from cl.registry import Registry
from cl.training.config import CallbackConfig


@dataclass
class Progress:
    """Where a run stands, as callbacks see it.

    Attributes:
        model: the towers, without the wrapper of several workers.
        objective: the objective.
        rank, world: this worker and the number of workers.
        step, total_steps: optimizer steps done, and planned.
        epoch: passes over the corpora that are complete.
        samples: positions of the corpora consumed so far, by all workers.
        stop: a callback sets it to end the run after this step, with a checkpoint. Every worker must set it at the
            same step: derive it from numbers that are the same on all of them, such as those of a record.
    """

    model: nn.Module
    objective: nn.Module
    rank: int
    world: int
    step: int
    total_steps: int
    epoch: int = 0
    samples: int = 0
    stop: bool = False


class Callback:
    """Base of all callbacks; every hook runs on every worker. `Config` is the pydantic model of its settings."""

    Config: type[Config] = Config

    def __init__(self, config: Any) -> None:
        self.config = config

    def on_start(self, progress: Progress) -> None:
        """Before the first step of this process, which is not step 1 when the run was resumed."""

    def on_record(self, progress: Progress, record: dict[str, Any]) -> None:
        """A record of metrics was made (every `log_every` steps); what is added to it is logged."""

    def on_checkpoint(self, progress: Progress, url: str) -> None:
        """A checkpoint was committed."""

    def on_end(self, progress: Progress) -> None:
        """After the last step."""


CALLBACKS: Registry[type[Callback]] = Registry("callback", package="cl.training.callbacks", group="clew.callbacks")


def build_callbacks(configs: Sequence[CallbackConfig]) -> list[Callback]:
    """The callbacks of a run.

    Raises:
        ConfigError: a name that is not registered, or settings that the callback does not take.
    """
    built = []
    for config in configs:
        cls = CALLBACKS[config.name]
        built.append(cls(parse_config(cls.Config, config.settings, where=f"callback {config.name!r}")))
    return built
