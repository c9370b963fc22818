"""Reports records to Ray Train, and through it to Ray Tune."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from cl.config import Config
from cl.training.callbacks.base import CALLBACKS, Callback, Progress


class RayReportConfig(Config):
    every_steps: int = Field(1, ge=1, description="steps between two reports; only steps that are logged are reported")


@CALLBACKS.register("ray_report", "report records to Ray Train and Ray Tune")
class RayReport(Callback):
    """`ray.train.report` waits for all workers, so report seldom: a checkpoint reports by itself."""

    Config = RayReportConfig

    def on_record(self, progress: Progress, record: dict[str, Any]) -> None:
        if progress.step % self.config.every_steps == 0:
            import ray.train

            ray.train.report(dict(record))
