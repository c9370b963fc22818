"""What a sweep found: the contents of sweep.json, and of each trial's trial.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from cl import storage

Status = Literal["running", "finished", "stopped", "failed", "not started"]
SWEEP, TRIAL = "sweep.json", "trial.json"


class Evaluation(BaseModel):
    """A score of a trial on the way."""

    number: int  # of `evaluations`
    step: int
    samples: int
    loss: float | None
    value: float
    stderr: float | None = None  # standard error of the value, where the metric is a share of queries
    chance: float | None = None


class TrialResult(BaseModel):
    """One trial, as far as it went."""

    id: str  # hash of everything that decides its result
    parameters: dict[str, Any]  # field of the training config -> value
    value: float | None = None  # of its last evaluation
    stderr: float | None = None
    status: Status = "running"  # stopped: by the scheduler, before its budget was used up
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0  # training and scoring, interrupted parts included
    error: str | None = None
    evaluations: list[Evaluation] = []
    sweep: str = ""  # digest of the sweep that ran it last
    attempt: str = ""  # of that sweep in which it last ran

    def add(self, evaluation: Evaluation) -> None:
        """Record a score."""
        self.evaluations.append(evaluation)
        self.value, self.stderr = evaluation.value, evaluation.stderr
        self.steps, self.samples = evaluation.step, evaluation.samples


class SweepResult(BaseModel):
    """The contents of sweep.json."""

    metric: str
    mode: Literal["max", "min"]
    chance: float | None
    best: TrialResult | None  # of those that used their whole budget
    trials: list[TrialResult]  # best first
    axes: list[str]  # the fields of the space
    samples: int  # budget of each trial
    digest: str  # of everything that decides the result

    def shown(self) -> dict[str, Any]:
        """What a terminal shows: the trials, best first."""
        trials = [
            {**trial.parameters, self.metric: trial.value, "chance": self.chance, "status": trial.status}
            | {"steps": trial.steps, "seconds": trial.seconds}
            for trial in self.trials
        ]
        best = self.best.parameters if self.best else None
        return {"metric": self.metric, "best": best, "samples a trial": self.samples, "trials": trials}


def read_trial(folder: str) -> TrialResult | None:
    """A trial's record, or None if it never started."""
    path = storage.join(folder, TRIAL)
    return TrialResult.model_validate(storage.read_json(path)) if storage.exists(path) else None


def ranked(trials: list[TrialResult], mode: str) -> list[TrialResult]:
    """Best first: whole budgets before parts of it, then by value, ties by id."""

    def key(trial: TrialResult) -> tuple[bool, float, str]:
        value = float("inf") if trial.value is None else -trial.value if mode == "max" else trial.value
        return trial.status != "finished", value, trial.id

    return sorted(trials, key=key)
