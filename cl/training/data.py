"""What a training config reads: the order of the samples, the model's inputs, and a loader over both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cl.batches.arranged import make_plan
from cl.batches.extra import ExtraTexts, open_extra
from cl.batches.labels import Label, open_labels
from cl.batches.loader import Loader, check_views
from cl.batches.steps import Plan
from cl.batches.stored import StoredView
from cl.corpus import open_corpus
from cl.encoders import build_inputs
from cl.encoders.inputs import Inputs
from cl.encoders.teacher import stored_views, with_teachers
from cl.training.config import TrainConfig


@dataclass(frozen=True)
class TrainingData:
    """The data of a run, the same on all workers; no model is built for it."""

    cfg: TrainConfig
    plan: Plan
    inputs: Inputs
    labels: list[Label]
    extra: list[ExtraTexts]
    stored: list[StoredView]

    @staticmethod
    def of(cfg: TrainConfig) -> TrainingData:
        """Open the corpora and what is read of them.

        Raises:
            ConfigError: a corpus, label or view that does not fit the model.
            DataError: a corpus that cannot be read.
        """
        plan = make_plan(
            [open_corpus(path) for path in cfg.corpus_paths], cfg.seed, cfg.batch_size, cfg.mixture, cfg.arrange
        )
        inputs = with_teachers(build_inputs(cfg.model, train=True), cfg.teachers, cfg.model)
        check_views(plan, inputs)
        return TrainingData(
            cfg,
            plan,
            inputs,
            open_labels(cfg.labels, plan.corpora),
            open_extra(cfg.extra, plan.corpora, inputs),
            stored_views(cfg.teachers, cfg.model, plan.corpora),
        )

    def loader(
        self,
        rank: int,
        world: int,
        done: int = 0,
        steps: int | None = None,
        threads: int | None = None,
        quarantine: Path | None = None,
        pin_memory: bool = False,
    ) -> Loader:
        """One worker's batches after `done` steps of the run; `threads` defaults to the config's."""
        return Loader(
            self.plan,
            rank,
            world,
            self.inputs,
            start=self.plan.at(done),
            steps=steps,
            workers=threads or self.cfg.loader.threads,
            prefetch=self.cfg.loader.prefetch,
            quarantine=quarantine,
            pin_memory=pin_memory,
            labels=self.labels,
            extra=self.extra,
            stored=self.stored,
        )
