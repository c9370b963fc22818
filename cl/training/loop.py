"""The training loop: the same function under Ray Train, under torchrun and in a process alone.

    read batch -> towers -> objective -> backward (gradients averaged) -> clip -> AdamW -> clamp temperature

What the loop needs to go on is in the checkpoint: weights, optimizer, objective, step and data position. Learning
rate, order of samples and random numbers are functions of the step, so the loss curve of a run that was interrupted
is that of one that was not.
"""

from __future__ import annotations

import contextlib
import logging
import time
import typing
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from cl import storage
from cl.batches.loader import Batch, Loader
from cl.batches.plan import BatchPlan
from cl.config import dump_config
from cl.corpus import open_corpus
from cl.encoders import EncoderModel, build_inputs, build_model
from cl.engine.collectives import Workers
from cl.errors import DataError
from cl.objectives import build_objective
from cl.training.callbacks import Progress, build_callbacks
from cl.training.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint, prune_checkpoints, save_checkpoint
from cl.training.config import Precision, TrainConfig
from cl.training.finite import check_finite, gradient_norm
from cl.training.metrics import MetricsWriter, read_metrics
from cl.training.optimizer import build_optimizer
from cl.training.outcome import TrainResult
from cl.training.place import own_device, torchrun_group
from cl.training.precision import cast, resolve
from cl.training.randomness import seed_everything
from cl.training.schedule import learning_rate, set_learning_rate
from cl.training.step import TrainStep, forward_backward, wrap

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
    with torchrun_group():
        return _Run(cfg, workers or Workers.current(), own_device(), report).train()


class _Run:
    """One worker's state between start and end of a run."""

    def __init__(self, cfg: TrainConfig, workers: Workers, device: torch.device, report: Report | None) -> None:
        self.cfg, self.workers, self.device, self.report = cfg, workers, device, report
        self.callbacks = build_callbacks(cfg.callbacks)
        self.plan = BatchPlan([open_corpus(path) for path in cfg.corpus_paths], cfg.seed, cfg.batch_size)
        self.total_steps = cfg.total_steps(self.plan.steps_per_epoch)
        self.model: EncoderModel = build_model(cfg.model, seed=cfg.seed)
        self.objective = build_objective(cfg.objective, cfg.model.embed_dim)
        self.precision = self._agree_on_precision()
        cast(self.model, self.precision).to(device)
        cast(self.objective, self.precision).to(device)
        self.step_module = TrainStep(self.model, self.objective, workers, self.precision)
        self.optimizer: Optimizer = build_optimizer(cfg.optimizer, self.step_module)
        self.step = 0
        self.seconds = 0.0  # of training up to `step`, lost work not counted
        self.resumed_from: int | None = None

    @property
    def leads(self) -> bool:
        """Whether this worker writes what a run writes once."""
        return self.workers.rank == 0

    def train(self) -> TrainResult:
        checkpoint = self._agree_on_checkpoint()
        if checkpoint is not None:
            self._restore(checkpoint)
        writer = MetricsWriter(self.cfg.out, self.step) if self.leads else None
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
        cfg = self.cfg
        module = wrap(self.step_module, self.device, cached=cfg.micro_batch is not None).train()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        progress = self._progress()
        for callback in self.callbacks:
            callback.on_start(progress)
        loader = Loader(
            self.plan,
            self.workers.rank,
            self.workers.size,
            build_inputs(cfg.model, train=True),
            start=self.plan.at(self.step),
            steps=self.total_steps - self.step,
            workers=cfg.loader.threads,
            prefetch=cfg.loader.prefetch,
            quarantine=Path(cfg.out) / "quarantine" / f"rank-{self.workers.rank}.jsonl",
            pin_memory=self.device.type == "cuda",
        )
        clock = _Clock(self.seconds, progress.samples)
        url = storage.join(cfg.checkpoint_url, f"step-{self.step:08d}")
        with contextlib.closing(typing.cast("Generator[Batch]", iter(loader))) as batches:
            while self.step < self.total_steps and not progress.stop:
                step = self.step + 1
                with clock.waiting():
                    batch = next(batches).to(self.device)
                rate = learning_rate(cfg.schedule, cfg.optimizer.lr, step, self.total_steps)
                set_learning_rate(self.optimizer, rate)
                seed_everything(cfg.seed, "step", step, self.workers.rank)
                output = forward_backward(module, self.step_module, batch, cfg.micro_batch)
                norm = gradient_norm(parameters, cfg.clip_norm)
                loss, norm_value = torch.stack([output.loss.double(), norm.double()]).tolist()
                check_finite(loss, norm_value, step, output.finite, batch.ids, self.workers)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.objective.clamp_()
                self.step = progress.step = step
                progress.epoch, progress.samples = self._position(step)
                last = step == self.total_steps
                if step % cfg.log_every == 0 or step == 1 or last:
                    record = {
                        "step": step,
                        "epoch": progress.epoch,
                        "samples": progress.samples,
                        "loss": loss,
                        **{name: value.detach().item() for name, value in output.metrics.items()},
                        "lr": rate,
                        "grad_norm": norm_value,
                        **clock.lap(progress.samples),
                    }
                    for callback in self.callbacks:
                        callback.on_record(progress, record)
                    if writer is not None:
                        writer.write(record)
                if step % cfg.checkpoint.every_steps == 0 or last or progress.stop:
                    self.seconds = clock.seconds()
                    url = self._checkpoint()
                    for callback in self.callbacks:
                        callback.on_checkpoint(progress, url)
                    if self.report is not None:
                        self.report({"step": step, "samples": progress.samples, "loss": loss, "checkpoint": url})
        self.seconds = clock.seconds()
        for callback in self.callbacks:
            callback.on_end(progress)
        return url

    def _position(self, step: int) -> tuple[int, int]:
        """Complete epochs and positions of the corpora consumed after `step` steps."""
        epoch, within = self.plan.at(step)
        return epoch, epoch * self.plan.samples + min(within * self.cfg.batch_size, self.plan.samples)

    def _progress(self) -> Progress:
        epoch, samples = self._position(self.step)
        return Progress(
            self.model,
            self.objective,
            self.workers.rank,
            self.workers.size,
            self.step,
            self.total_steps,
            epoch,
            samples,
        )

    def _agree_on_precision(self) -> Precision:
        """The first worker's choice, for all: machines of one run may differ."""
        choice = [resolve(self.cfg.precision, self.device)]
        if self.workers.size > 1:
            dist.broadcast_object_list(choice, group=self.workers.group, device=self.device, group_src=0)
        return choice[0]

    def _agree_on_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint, chosen by the first worker for all."""
        root = self.cfg.checkpoint_url
        found = newest_checkpoint(root) if self.leads else None
        if self.workers.size == 1:
            return found
        choice = [found.step if found else None]
        dist.broadcast_object_list(choice, group=self.workers.group, device=self.device, group_src=0)
        if choice[0] is None or self.leads:
            return found
        return open_checkpoint(root, choice[0])

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.trainer_state()
        if state["plan"] != self.plan.digest:
            raise DataError(
                f"{checkpoint.url} was made with other corpora, seed or batch size than {self.cfg.out} is to go on "
                "with: the order of samples would not be the same."
            )
        self.model.load_state_dict(checkpoint.model_state())
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.resumed_from = self.step
        if self.leads:
            logger.warning("Going on from step %d (%s).", self.step, checkpoint.url)

    def _checkpoint(self) -> str:
        """Commit a checkpoint (first worker) and return its URL."""
        root = self.cfg.checkpoint_url
        url = storage.join(root, f"step-{self.step:08d}")
        if self.leads:
            epoch, within = self.plan.at(self.step)
            state = {
                "step": self.step,
                "total_steps": self.total_steps,
                "position": {"epoch": epoch, "step": within},
                "plan": self.plan.digest,
                "seed": self.cfg.seed,  # with the step it gives every random number that follows
                "seconds": self.seconds,
                "workers": self.workers.size,
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            save_checkpoint(root, self.step, self.model, self.cfg.model, state, dump_config(self.cfg))
            prune_checkpoints(root, self.cfg.checkpoint.keep_last, self.step)
        return url

    def _result(self, checkpoint: str) -> TrainResult:
        records = read_metrics(Path(self.cfg.out) / "metrics.jsonl") if self.leads else []
        _, samples = self._position(self.step)
        return TrainResult(
            out=self.cfg.out,
            steps=self.step,
            samples=samples,
            samples_per_second=samples / max(self.seconds, 1e-9),
            loss_first=records[0]["loss"] if records else None,
            loss_last=records[-1]["loss"] if records else None,
            seconds=self.seconds,
            checkpoint=checkpoint,
            workers=self.workers.size,
            precision=self.precision,
            resumed_from=self.resumed_from,
        )


class _Clock:
    """Times a run: seconds since its start, and speed and waiting between two records."""

    def __init__(self, seconds: float, samples: int) -> None:
        self._before, self._start = seconds, time.perf_counter()
        self._lap, self._samples, self._waited = self._start, samples, 0.0

    def waiting(self) -> _Waiting:
        """Time a block as waiting for data."""
        return _Waiting(self)

    def add_wait(self, seconds: float) -> None:
        self._waited += seconds

    def seconds(self) -> float:
        """Seconds of training, those of the interrupted part of the run included."""
        return self._before + time.perf_counter() - self._start

    def lap(self, samples: int) -> dict[str, float]:
        """Numbers of the time since the last lap, and a new lap."""
        now = time.perf_counter()
        spent = max(now - self._lap, 1e-9)
        numbers = {
            "samples_per_second": (samples - self._samples) / spent,
            "data_wait": min(self._waited / spent, 1.0),
            "seconds": self.seconds(),
        }
        self._lap, self._samples, self._waited = now, samples, 0.0
        return numbers


class _Waiting:
    def __init__(self, clock: _Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._clock.add_wait(time.perf_counter() - self._start)
