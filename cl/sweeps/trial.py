"""One trial: the training function, scored at fixed shares of its budget.

A trial's folder is named by everything that decides its result, and its record is written after each score. So a
trial that is started again reports what it already has, goes on from its newest checkpoint, and one that had finished
is not trained again, whatever became of the sweep around it.
"""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from cl import storage
from cl.config import apply_overrides, config_digest, parse_config
from cl.encoders import load_checkpoint_model
from cl.errors import user_error
from cl.evaluation.config import CorpusEval, MetricList
from cl.evaluation.embed import Encoder, pick_device
from cl.evaluation.run import evaluate_corpus, open_evals
from cl.sweeps.result import TRIAL, Evaluation, TrialResult, read_trial
from cl.sweeps.space import Parameters, words
from cl.training.checkpoint import newest_checkpoint
from cl.training.config import TrainConfig
from cl.training.run import train


@dataclass(frozen=True)
class Score:
    """The metric of one checkpoint, averaged over the validation corpora."""

    value: float
    chance: float | None
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class Scorer:
    """Scores checkpoints on validation corpora."""

    validation: dict[str, CorpusEval]
    metric: str
    batch_size: int
    bf16: bool

    @property
    def metrics(self) -> MetricList:
        """The metric's family alone, without examples to look at."""
        return [{self.metric.split("/")[0]: {}}]

    def checkpoint(self, path: str) -> Score:
        model, inputs, _ = load_checkpoint_model(path)
        device = pick_device("auto")
        return self.encoder(Encoder(model.to(device), inputs, device, self.batch_size, self.bf16, threads=1))

    def encoder(self, encoder: Encoder, limit: int | None = None) -> Score:
        """Score a model.

        Raises:
            ConfigError: the metric is not measured on one of the corpora.
        """
        figures = []
        for name, (corpus, metrics) in open_evals(self.validation, self.metrics).items():
            most = self.validation[name].limit
            most = limit if most is None else most if limit is None else min(limit, most)
            figures.append(evaluate_corpus(name, corpus, metrics, encoder, most).figure(self.metric))
        chances = [figure.chance for figure in figures if figure.chance is not None]
        errors = [figure.stderr for figure in figures if figure.stderr is not None]
        many = len(figures)
        return Score(
            value=math.fsum(figure.value for figure in figures) / many,
            chance=math.fsum(chances) / many if len(chances) == many else None,
            stderr=math.sqrt(math.fsum(e * e for e in errors)) / many if len(errors) == many else None,
            higher_is_better=figures[0].higher_is_better,
        )


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep share; picklable."""

    base: dict[str, Any]  # a resolved training config
    samples: int
    warmup: float | None
    evaluations: int
    scorer: Scorer
    threads: int
    out: str  # absolute
    sweep: str = ""  # digest of the sweep
    attempt: str = ""  # which start of the sweep this is

    def config(self, parameters: Parameters) -> TrainConfig:
        """The training run of a trial.

        Raises:
            ConfigError: a field of the space that does not exist, or a value that it does not take.
        """
        tree = apply_overrides(copy.deepcopy(self.base), words(parameters))
        tree |= {"samples": self.samples, "steps": None, "epochs": None, "out": self.out}
        where = "space: " + ", ".join(f"{path}={value}" for path, value in parameters.items())
        checked = parse_config(TrainConfig, tree, where)
        total = checked.total_steps(0)
        tree["checkpoint"] = {"every_steps": -(-total // self.evaluations), "keep_last": 1}
        if self.warmup is not None:
            tree["schedule"]["warmup_steps"] = round(self.warmup * total)
        tree["out"] = self.folder(
            config_digest({"train": tree, "score": _identity(self.scorer, self.evaluations)})[:10]
        )
        return parse_config(TrainConfig, tree, where)

    def folder(self, trial: str) -> str:
        return os.path.join(self.out, "trials", trial)


def _identity(scorer: Scorer, evaluations: int) -> dict[str, Any]:
    """What, beside the training config, decides a trial's record."""
    corpora = {name: spec.model_dump(mode="json") for name, spec in scorer.validation.items()}
    return {"validation": corpora, "metric": scorer.metric, "bf16": scorer.bf16, "evaluations": evaluations}


class _Stopped(KeyboardInterrupt):
    """The scheduler has ended the trial; the training run takes it for an interruption and closes its files."""


class Trial:
    """A trial's record on disk, and what is reported of it."""

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        self.plan, self.cfg = plan, plan.config(parameters)
        self.total = self.cfg.total_steps(0)
        known = read_trial(self.cfg.out)
        self.result = known or TrialResult(id=os.path.basename(self.cfg.out), parameters=parameters)
        self.failed_before = self.result.status == "failed" and self.result.attempt == plan.attempt
        self.result.sweep, self.result.attempt = plan.sweep, plan.attempt
        self._clock = time.monotonic()

    def write(self) -> None:
        now = time.monotonic()
        self.result.seconds += now - self._clock
        self._clock = now
        storage.write_json(storage.join(self.cfg.out, TRIAL), self.result.model_dump())

    def score(self, report: dict[str, Any]) -> dict[str, Any] | None:
        """Score a checkpoint that training has reported and record it.

        Returns:
            what Tune is to hear now: nothing if this part of the budget was scored before, and nothing about the last
            one, which waits until the training run has closed its files.
        """
        number = report["step"] * self.plan.evaluations // self.total
        last = self.result.evaluations[-1].number if self.result.evaluations else 0
        if number <= last:
            return None
        score = self.plan.scorer.checkpoint(report["checkpoint"])
        evaluation = Evaluation(
            number=number,
            step=report["step"],
            samples=report["samples"],
            loss=report["loss"],
            value=score.value,
            stderr=score.stderr,
            chance=score.chance,
        )
        self.result.add(evaluation)
        self.write()
        return None if number == self.plan.evaluations else _told(evaluation)

    def catch_up(self) -> None:
        """Score a checkpoint that was written, but not scored before the trial was killed."""
        found = newest_checkpoint(self.cfg.checkpoint_url)
        if found is not None:
            told = self.score(
                {
                    "step": found.step,
                    "samples": min(found.step * self.cfg.batch_size, self.cfg.samples or 0),
                    "loss": None,
                    "checkpoint": found.url,
                }
            )
            if told is not None:
                _report(told)

    def train(self) -> None:
        """Train to the end of the budget, or until the scheduler stops the trial."""
        if self.cfg.workers.count > 0:
            train(self.cfg, resume=True, callbacks=[_ScoreInController(self.plan, self.result.parameters)])
            self.result = read_trial(self.cfg.out) or self.result
            return

        def report(record: dict[str, Any]) -> None:
            told = self.score(record)
            if told is not None:
                _report(told)

        train(self.cfg, resume=True, report=report)


class _ScoreInController(TuneReportCallback):
    """With Ray Train workers: scores each checkpoint where their reports arrive and passes the score to Tune."""

    def __init__(self, plan: Plan, parameters: Parameters) -> None:
        super().__init__()
        self._plan, self._parameters = plan, parameters

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        torch.set_num_threads(self._plan.threads)
        told = Trial(self._plan, self._parameters).score(metrics[0])
        if told is not None:
            super().after_report(run_context, [told], None)


def _told(evaluation: Evaluation) -> dict[str, Any]:
    return {"evaluation": evaluation.number, "value": evaluation.value, "samples": evaluation.samples}


def _report(told: dict[str, Any]) -> None:
    try:
        tune.report(told)
    except SystemExit:  # how Tune ends a function that it has stopped
        raise _Stopped from None


def run_trial(plan: Plan, parameters: Parameters) -> None:
    """What Tune runs: report what is known of the trial, train the rest of its budget, report each score.

    Raises:
        Exception: what training raised; recorded first.
    """
    os.environ["CLEW_QUIET"] = "1"
    torch.set_num_threads(plan.threads)
    trial = Trial(plan, parameters)
    if trial.failed_before:
        raise RuntimeError(trial.result.error)
    try:
        if trial.result.status != "finished":
            trial.result.status, trial.result.error = "running", None
            trial.write()
            for evaluation in trial.result.evaluations:
                _report(_told(evaluation))
            trial.catch_up()
            trial.train()
            trial.result.status = "finished"
            trial.write()
            _report(_told(trial.result.evaluations[-1]))
        else:
            trial.write()
            for evaluation in trial.result.evaluations:
                _report(_told(evaluation))
    except _Stopped:
        return
    except Exception as error:
        cause = user_error(error) or error
        trial.result.status = "failed"
        trial.result.error = str(cause) or type(cause).__name__
        trial.write()
        raise
