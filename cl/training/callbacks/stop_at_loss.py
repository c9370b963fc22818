"""Ends a run early once its loss is low enough."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cl.config import Config
from cl.training.callbacks.base import CALLBACKS, Callback, Progress


class StopAtLossConfig(Config):
    loss: float = Field(description="the run ends at the first record whose loss is not above this")


@CALLBACKS.register("stop_at_loss", "end the run at the first record whose loss is at or below a bound")
class StopAtLoss(Callback):
    """The loss is that of the global batch, the same on every worker, so all of them stop at the same step."""

    Config = StopAtLossConfig

    def on_record(self, progress: Progress, record: dict[str, Any]) -> None:
        progress.stop = progress.stop or record["loss"] <= self.config.loss
