"""`train`: what `clew train` calls."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from cl.batches.steps import Plan
from cl.encoders.model import check_model
from cl.errors import ClewError
from cl.run import write_run_info
from cl.training.callbacks import build_callbacks
from cl.training.card import write_card
from cl.training.config import TrainConfig
from cl.training.data import TrainingData
from cl.training.outcome import TrainResult, read_result
from cl.training.place import under_torchrun
from cl.training.resume import prepare_folder
from cl.training.watch import watch

logger = logging.getLogger(__name__)

__all__ = ["TrainResult", "train"]


def train(
    cfg: TrainConfig,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    report: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Train a model and return the run's summary.

    `workers.count` Ray Train workers do it; with 0 this process does it alone, without Ray; and under torchrun, where
    every process calls this, the processes that torchrun started do.

    Args:
        cfg: the run.
        resume: go on from the newest whole checkpoint of a run that stopped (or is to be longer).
        callbacks: `ray.train.UserCallback`s, such as Ray Tune's; only with Ray Train workers.
        report: called after each checkpoint with {"step", "samples", "loss", "checkpoint"}; only without Ray Train
            workers, which report to their callbacks.

    Raises:
        ClewError: one sentence on what to mend.
        KeyboardInterrupt: after all workers were stopped; the run can be resumed.
    """
    if under_torchrun() and int(os.environ["RANK"]) != 0:
        from cl.training.loop import train_worker

        return train_worker(cfg)
    finished = prepare_folder(cfg, resume)
    if finished is not None:
        logger.warning("%s is finished (step %d): nothing is left to train.", cfg.out, finished.steps)
        return finished
    plan = check_run(cfg)
    with (
        write_run_info(cfg.out, "train", cfg) as info,
        watch(cfg.out, cfg.total_steps(plan.steps_per_epoch), cfg.batch_size, relay_log=_uses_ray(cfg)),
    ):
        if _uses_ray(cfg):
            from cl.training.launch import launch

            launch(cfg, callbacks)
        else:
            from cl.training.loop import train_worker

            train_worker(cfg, report)
        result = read_result(cfg.out)
        if result is None:
            raise ClewError(f"The workers ended, but {cfg.out} has no summary.json: is it on storage they all share?")
        write_card(cfg, result)
        info.add(steps=result.steps, samples=result.samples, workers=result.workers)
    return result


def check_run(cfg: TrainConfig) -> Plan:
    """Find what the user has to mend before any worker starts; returns the run's plan.

    Raises:
        ClewError: a corpus, a model, a view, a teacher, a label, further texts or a callback that cannot be used.
    """
    build_callbacks(cfg.callbacks)
    check_model(cfg.model)
    return TrainingData.of(cfg).plan


def _uses_ray(cfg: TrainConfig) -> bool:
    return cfg.workers.count > 0 and not under_torchrun()
