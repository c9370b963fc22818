"""The config of a sweep.

    base: sample                      # a training config, by name or path
    train: {corpus: runs/curated}     # fields set over it
    space:
      objective.temperature: {choice: [0.03, 0.07, 0.2]}
      batch_size: {choice: [32, 128]}
    samples: 20000                    # each trial sees as many, so steps = samples / batch size
    validation: {val: runs/heldout}
    metric: retrieval/text_to_image/R@1

Losses cannot be compared between temperatures or batch sizes; a metric on validation corpora can.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cl.config import Config
from cl.evaluation.config import Corpora, Precision

KINDS = ("choice", "uniform", "loguniform", "integer")


class Axis(Config):
    """The values that one field may take: exactly one of these."""

    choice: list[Any] | None = Field(None, min_length=1, description="one of these values")
    uniform: tuple[float, float] | None = Field(None, description="from, to")
    loguniform: tuple[float, float] | None = Field(None, description="from, to; uniform in the logarithm")
    integer: tuple[int, int] | None = Field(None, description="from, to, both included")

    @model_validator(mode="after")
    def _exactly_one(self) -> Axis:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(KINDS)} must be given, but {len(given)} are")
        if given[0] != "choice":
            low, high = getattr(self, given[0])
            if low >= high:
                raise ValueError(f"{given[0]} must go from a smaller to a larger number, not from {low} to {high}")
            if given[0] == "loguniform" and low <= 0:
                raise ValueError(f"loguniform must start above 0, not at {low}")
        return self

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


def _flat_space(value: Any) -> Any:
    """`objective: {temperature: {choice: ...}}` is the same as `objective.temperature: {choice: ...}`."""
    if not isinstance(value, dict):
        return value
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node and not set(KINDS) & node.keys():
            for key, below in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), below)
        else:
            flat[prefix] = node

    walk("", value)
    return flat


def _named_corpora(value: Any) -> Any:
    """A single path stands for one corpus with the name of its folder."""
    return {value.rstrip("/").rsplit("/", 1)[-1]: value} if isinstance(value, str) else value


class AshaConfig(Config):
    """Asynchronous successive halving: stops trials that are behind at evaluations grace, grace x reduction, ...

    Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020.
    """

    name: Literal["asha"] = "asha"
    grace: int = Field(1, ge=1, description="evaluations that every trial gets")
    reduction: float = Field(2.0, gt=1, description="one in this many trials goes on from rung to rung")


def _scheduler(value: Any) -> Any:
    """`asha` and `none` may stand for themselves."""
    return {"asha": {"name": "asha"}, "none": None}.get(value, value) if isinstance(value, str) else value


class SweepConfig(Config):
    """Trials of one training config at an equal budget of samples."""

    base: str = Field(description="training config: a path, or the name of a shipped one")
    train: dict[str, Any] = Field({}, description="fields of the training config to set over it, as a tree")
    space: Annotated[dict[str, Axis], BeforeValidator(_flat_space)] = Field(
        min_length=1, description="field of the training config -> values to try"
    )
    searcher: Literal["grid", "random", "optuna"] = Field(
        "grid", description="grid: every combination of choices; random; optuna: a tree-structured Parzen estimator"
    )
    trials: int | None = Field(None, ge=1, description="how many; grid: all combinations")
    samples: int = Field(ge=1, description="budget of each trial in samples; its steps = samples / batch size")
    warmup: float | None = Field(
        None, ge=0, lt=1, description="warm-up as a share of the budget, instead of the training config's steps"
    )
    evaluations: int = Field(4, ge=1, description="how often a trial is scored, evenly over its budget")
    scheduler: Annotated[AshaConfig | None, BeforeValidator(_scheduler)] = Field(
        AshaConfig(), description="asha (or its settings) stops trials early; none runs all to their end"
    )
    validation: Corpora = Field(
        min_length=1, description="corpora to score on: name -> path, or {path, metrics, limit}"
    )
    metric: str = Field("retrieval/text_to_image/R@1", description="the score: its mean over the validation corpora")
    batch_size: int = Field(128, ge=1, description="images or texts embedded at a time when scoring")
    precision: Precision = Field("fp32", description="of scoring")
    concurrency: int = Field(2, ge=1, description="trials at a time")
    cpus_per_trial: float = Field(1, gt=0, description="cores (and threads) of a trial that trains without Ray workers")
    gpus_per_trial: float = Field(0, ge=0, description="GPUs of such a trial")
    seed: int = Field(0, ge=0, lt=2**32, description="of the random and optuna searchers")
    out: str = Field(description="folder of the sweep: sweep.json, trials/ID/ (a training run each)")

    @model_validator(mode="after")
    def _fields_agree(self) -> SweepConfig:
        if self.searcher == "grid":
            open_ended = [path for path, axis in self.space.items() if axis.kind != "choice"]
            if open_ended:
                raise ValueError(f"a grid needs choices, but space.{open_ended[0]} is a range: use searcher=random")
        elif self.trials is None:
            raise ValueError(f"searcher {self.searcher} needs the number of trials")
        if self.scheduler is not None and self.scheduler.grace > self.evaluations:
            raise ValueError(f"scheduler.grace must be at most evaluations ({self.evaluations})")
        if "://" in self.out:
            raise ValueError("out must be a local or shared folder")
        return self
