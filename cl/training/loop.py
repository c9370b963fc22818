"""The training loop: the same function under Ray Train, under torchrun and in a process alone.

    read batch -> towers, teachers -> objective -> backward (gradients averaged) -> clip -> optimizer
               -> clamp temperature -> teachers follow

What the loop needs to go on is in the checkpoint: weights, teachers, optimizer, objective, step and data position.
Learning rate, order of samples and random numbers are functions of the step, so the loss curve of a run that was
interrupted is that of one that was not.
"""

from __future__ import annotations

import contextlib
import logging
import typing
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cl import storage
from cl.batches.batch import Batch
from cl.batches.loader import Loader
from cl.encoders import build_model
from cl.encoders.teacher import build_teachers
from cl.engine.collectives import Workers
from cl.objectives import build_objective
from cl.pairs import Clock
from cl.training.agreement import agree_on_checkpoint, agree_on_precision
from cl.training.callbacks import Progress, build_callbacks
from cl.training.config import TrainConfig
from cl.training.data import TrainingData
from cl.training.finite import Guard, gradient_norm
from cl.training.geometry import measure_geometry
from cl.training.length import RunLength
from cl.training.locks import Locks
from cl.training.metrics import MetricsWriter, read_metrics
from cl.training.optimizer import build_optimizer, set_learning_rate
from cl.training.outcome import TrainResult
from cl.training.parallel import average_unsharded, prepare, wrap
from cl.training.place import own_device, torchrun_group
from cl.training.precision import cast
from cl.training.randomness import seed_everything
from cl.training.schedule import learning_rate
from cl.training.stall import StallWatch
from cl.training.state import RunState
from cl.training.step import StepOutput, TrainStep, forward_backward
from cl.training.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


def train_worker(cfg: TrainConfig, report: Report | None = None, workers: Workers | None = None) -> TrainResult:
    """Train as one of the workers of the current process group (all of them call this), or alone.

    Goes on from the newest whole checkpoint below `cfg.checkpoint_url`, if there is one.

    Args:
        cfg: the run; the same on all workers.
        report: called on every worker after each checkpoint with {"step", "samples", "loss", "checkpoint"}.
        workers: those that train together; default: the current process group.

    Returns:
        the run's result, which the first worker has also written to `summary.json`.

    Raises:
        ClewError: a config, corpus or checkpoint that cannot be used, or a loss that is not finite.
    """
    with torchrun_group(cfg.workers.timeout_seconds):
        return _Run(cfg, workers or Workers.current(), own_device(), report).train()


class _Run:
    """One worker's run between start and end."""

    def __init__(self, cfg: TrainConfig, workers: Workers, device: torch.device, report: Report | None) -> None:
        self.cfg, self.workers, self.device, self.report = cfg, workers, device, report
        self.callbacks = build_callbacks(cfg.callbacks)
        self.data = TrainingData.of(cfg)
        plan = self.plan = self.data.plan
        steps = cfg.total_steps(plan.steps_per_epoch)
        self.length = RunLength(steps, plan.steps_per_epoch, plan.samples, cfg.batch_size)
        self.model = build_model(cfg.model, seed=cfg.seed)
        self.locks = Locks(cfg.locked, self.model)
        seed_everything(cfg.seed, "objective")  # what fixes the weights of its heads, prototypes and decoders
        self.objective = build_objective(cfg.objective, cfg.model.embed_dim)
        self.precision = agree_on_precision(cfg.precision, device, workers)
        teachers = build_teachers(cfg.teachers, cfg.model, self.model)
        module = TrainStep(self.model, self.objective, workers, self.precision, teachers, self.length)
        cast(module, self.precision).to(device)
        prepare(module, cfg.parallel, device)
        guard = Guard(cfg.not_finite, cfg.out, workers)
        self.state = RunState(module, build_optimizer(cfg.optimizer, module), guard, plan.digest)
        self.resumed_from: int | None = None

    @property
    def leads(self) -> bool:
        """Whether this worker writes what a run writes once."""
        return self.workers.rank == 0

    def train(self) -> TrainResult:
        checkpoint = agree_on_checkpoint(self.cfg.checkpoint_url, self.device, self.workers)
        if checkpoint is not None:
            self.state.restore(checkpoint, self.cfg.out)
            self.resumed_from = self.state.step
            if self.leads:
                logger.warning("Going on from step %d (%s).", self.state.step, checkpoint.url)
        writer = MetricsWriter(self.cfg.out, self.state.step) if self.leads else None
        try:
            url = self._train(writer)
        finally:
            if writer is not None:
                writer.close()
        result = self._result(url)
        if self.leads:
            result.write()
        return result

    def _train(self, writer: MetricsWriter | None) -> str:
        cfg, state = self.cfg, self.state
        self.locks.set_(self._clock())
        module = self._wrapped()
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        cached = [] if cfg.micro_batch is None else [*self.objective.parameters()]  # which the cache has averaged
        progress = self._progress()
        for callback in self.callbacks:
            callback.on_start(progress)
        watch = Stopwatch(state.seconds, progress.samples)
        url = storage.join(cfg.checkpoint_url, f"step-{state.step:08d}")
        with (
            StallWatch(cfg.out, self.workers.rank, self.workers.size, cfg.workers.stall_seconds) as stall,
            contextlib.closing(typing.cast("Generator[Batch]", iter(self._loader()))) as batches,
        ):
            while state.step < self.length.steps and not progress.stop:
                step = state.step + 1
                stall.beat(step)
                if self.locks.set_(self._clock()):
                    del module  # two wrappers would both average the gradients
                    module = self._wrapped()
                with watch.waiting():
                    batch = next(batches).to(self.device)
                rate = learning_rate(cfg.schedule, cfg.optimizer.lr, step, self.length.steps) * state.guard.rate(step)
                set_learning_rate(state.optimizer, rate)
                seed_everything(cfg.seed, "step", step, self.workers.rank)
                output = forward_backward(module, state.module, batch, cfg.micro_batch)
                average_unsharded(state.module, cached)
                norm = gradient_norm(parameters, cfg.clip_norm)
                loss, norm_value = torch.stack([output.loss.double(), norm.double()]).tolist()
                if state.guard.accept(loss, norm_value, step, output.finite, batch.ids):
                    state.optimizer.step()
                    self.objective.clamp_()
                    for teacher in state.module.teachers.values():
                        teacher.follow_(self.model, step - 1, self.length.steps)
                state.optimizer.zero_grad(set_to_none=True)
                state.step = progress.step = step
                progress.epoch, progress.samples = self.length.done(step)
                last = step == self.length.steps
                looked = self._geometry(step, output, batch)
                if step % cfg.log_every == 0 or step == 1 or last or looked:
                    record = {
                        "step": step,
                        "epoch": progress.epoch,
                        "samples": progress.samples,
                        "loss": loss,
                        **{name: value.detach().item() for name, value in output.metrics.items()},
                        "lr": rate,
                        "grad_norm": norm_value,
                        **({"skipped": state.guard.skipped} if state.guard.skipped else {}),
                        **looked,
                        **watch.lap(progress.samples),
                    }
                    for callback in self.callbacks:
                        callback.on_record(progress, record)
                    if writer is not None:
                        writer.write(record)
                if step % cfg.checkpoint.every_steps == 0 or last or progress.stop:
                    state.seconds = watch.seconds()
                    url = self._checkpoint()
                    for callback in self.callbacks:
                        callback.on_checkpoint(progress, url)
                    if self.report is not None:
                        self.report({"step": step, "samples": progress.samples, "loss": loss, "checkpoint": url})
        state.seconds = watch.seconds()
        for callback in self.callbacks:
            callback.on_end(progress)
        return url

    def _geometry(self, step: int, output: StepOutput, batch: Batch) -> dict[str, Any]:
        """The shape of the embeddings, at the steps at which it is looked at."""
        config = self.cfg.geometry
        if config is None or step % config.every_steps:
            return {}
        return measure_geometry(output.embeddings, batch.weight, batch.content, self.workers, config.samples)

    def _clock(self) -> Clock:
        """Where in the run the next step is."""
        return self.length.clock(*self.plan.at(self.state.step))

    def _wrapped(self) -> nn.Module:
        """Towers and objective, in training mode and as the workers share their gradients."""
        module = wrap(self.state.module, self.device, cached=self.cfg.micro_batch is not None).train()
        self.locks.still_()
        return module

    def _loader(self) -> Loader:
        """This worker's batches from the next step to the last."""
        return self.data.loader(
            self.workers.rank,
            self.workers.size,
            done=self.state.step,
            steps=self.length.steps - self.state.step,
            quarantine=Path(self.cfg.out) / "quarantine" / f"rank-{self.workers.rank}.jsonl",
            pin_memory=self.device.type == "cuda",
        )

    def _progress(self) -> Progress:
        epoch, samples = self.length.done(self.state.step)
        return Progress(
            self.model,
            self.objective,
            self.workers.rank,
            self.workers.size,
            self.state.step,
            self.length.steps,
            epoch,
            samples,
        )

    def _checkpoint(self) -> str:
        """Commit a checkpoint (all workers their tables, the first the rest) and return its URL."""
        tables = self.state.save_tables(self.cfg)
        whole = self.state.whole(keep=self.leads)
        if self.leads:
            self.state.save(self.cfg, whole, self.length.steps, self.plan.at(self.state.step), tables)
        return storage.join(self.cfg.checkpoint_url, f"step-{self.state.step:08d}")

    def _result(self, checkpoint: str) -> TrainResult:
        records = read_metrics(Path(self.cfg.out) / "metrics.jsonl") if self.leads else []
        _, samples = self.length.done(self.state.step)
        return TrainResult(
            out=self.cfg.out,
            steps=self.state.step,
            samples=samples,
            samples_per_second=samples / max(self.state.seconds, 1e-9),
            loss_first=records[0]["loss"] if records else None,
            loss_last=records[-1]["loss"] if records else None,
            seconds=self.state.seconds,
            checkpoint=checkpoint,
            workers=self.workers.size,
            precision=self.precision,
            resumed_from=self.resumed_from,
        )
