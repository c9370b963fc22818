"""The config of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cl.batches.arrangements import ArrangeConfig
from cl.batches.extra import ExtraConfig
from cl.batches.labels import LabelConfig
from cl.batches.mixture import MixtureConfig
from cl.config import Config, load_tree, merge
from cl.encoders.config import ModelConfig
from cl.encoders.teacher import TeacherConfig, teacher_view
from cl.objectives import ObjectiveConfig
from cl.training.geometry import GeometryConfig
from cl.training.locks import LockConfig
from cl.training.optimizer import OptimizerConfig

Precision = Literal["auto", "fp32", "bf16", "fp64"]


class CorpusConfig(Config):
    """One corpus to train on."""

    path: str = Field(description="folder or fsspec URL of a corpus")


class ScheduleConfig(Config):
    """Linear warm-up, then the rest of the run."""

    kind: Literal["cosine", "constant"] = Field("cosine", description="what follows the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0 to the peak")
    final_fraction: float = Field(0.0, ge=0, le=1, description="learning rate that the cosine ends at / peak")


class ParallelConfig(Config):
    """Where weights lie, what is computed twice to save memory, what is compiled."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = Field("ddp", description="replicated, sharded, or replicas of shards")
    shard_size: int | None = Field(None, ge=2, description="hsdp: workers that hold one copy of the weights")
    reshard: bool = Field(True, description="fsdp, hsdp: free a block's weights between forward and backward")
    activation_checkpointing: bool = Field(False, description="compute the blocks of the towers again in backward")
    compile: bool = Field(False, description="compile the blocks of the towers with torch.compile")

    @model_validator(mode="after")
    def _shard_size_fits(self) -> ParallelConfig:
        if (self.strategy == "hsdp") != (self.shard_size is not None):
            raise ValueError("shard_size is needed by strategy hsdp, and by it alone")
        return self


class WorkersConfig(Config):
    """Who trains. Under torchrun, torchrun decides how many, and starts lost ones anew."""

    count: int = Field(1, ge=0, description="Ray Train workers; 0 trains in this process, without Ray")
    cpus: float = Field(1, gt=0, description="cores reserved for each worker")
    gpus: int | None = Field(None, ge=0, le=1, description="GPUs a worker; null: one each if the cluster has enough")
    max_failures: int = Field(3, ge=0, description="how often lost workers are replaced before the run fails")
    stall_seconds: float = Field(
        300, gt=0, description="a step that takes longer is told, with who holds it up and where"
    )
    timeout_seconds: int = Field(
        1800,
        ge=1,
        description="a collective that a worker does not reach fails after as long, and all start anew",
    )


class CheckpointsConfig(Config):
    """When and where the state of the run is kept."""

    every_steps: int = Field(100, ge=1, description="steps between two checkpoints; the last step always has one")
    keep_last: int = Field(2, ge=1, description="how many are kept")
    path: str | None = Field(None, description="folder or fsspec URL all workers reach; null: OUT/checkpoints")


class LoaderConfig(Config):
    """How each worker reads ahead."""

    threads: int = Field(2, ge=1, description="decoding threads a worker")
    prefetch: int = Field(2, ge=1, description="batches decoded ahead")


class NotFiniteConfig(Config):
    """What happens when the loss or the gradient is no number."""

    action: Literal["stop", "skip"] = Field("stop", description="end the run, or leave the step out and go on")
    limit: int = Field(3, ge=1, description="skip: this many steps in a row are left out, then the run ends")
    backoff: float = Field(0.5, gt=0, le=1, description="skip: the learning rate after it, times the schedule's")
    backoff_steps: int = Field(100, ge=0, description="skip: steps in which it rises to the schedule's again")


class CallbackConfig(Config, extra="allow"):
    """A registered callback and its own settings."""

    name: str = Field(description="as registered in clew.callbacks")

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TrainConfig(Config):
    """A training run. Exactly one of `steps`, `samples` and `epochs` says how long it is."""

    out: str = Field(description="folder of the run: config, metrics, checkpoints, summary")
    seed: int = Field(0, ge=0, lt=2**63, description="fixes initial weights, order of samples, augmentation, dropout")
    corpus: str | None = Field(None, description="the corpus to train on, if it is a single one")
    corpora: list[CorpusConfig] = Field([], description="the corpora to train on")
    mixture: MixtureConfig | None = Field(
        None, description="composition of the global batches from parts; null: every sample once an epoch"
    )
    arrange: ArrangeConfig | None = Field(
        None, description="how samples are dealt out among several steps: distinct, alike, grouped; null: as they come"
    )
    model: ModelConfig = Field(description="towers and their views")
    teachers: dict[str, TeacherConfig] = Field(
        {}, description="models without gradient: each adds the views VIEW_TEACHER to the batch that the objective sees"
    )
    locked: dict[str, LockConfig] = Field(
        {}, description="tower -> how much of it is trained: nothing, its top layers, or more and more of them"
    )
    labels: dict[str, LabelConfig] = Field(
        {},
        description="label name -> column of the corpora, or {column, kind, values}: what is known of a sample",
    )
    extra: dict[str, ExtraConfig] = Field(
        {}, description="name -> {column, view, role, most}: lists of further texts, such as mined negatives"
    )
    # A factory: to make the default loads the registry, which may import the user's package that imports this module.
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="what is learnt")
    batch_size: int = Field(256, ge=2, description="samples of the global batch, whatever the number of workers")
    micro_batch: int | None = Field(
        None, ge=1, description="samples a worker encodes at a time (gradient caching, same result); null: all at once"
    )
    steps: int | None = Field(None, ge=1, description="optimizer steps")
    samples: int | None = Field(None, ge=1, description="samples seen; rounded up to whole steps")
    epochs: int | None = Field(None, ge=1, description="passes over the corpora")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Precision = Field(
        "auto",
        description="bf16 (autocast, fp32 weights), fp32, fp64 (exact); auto: bf16 where it is native, else fp32",
    )
    clip_norm: float | None = Field(1.0, gt=0, description="largest norm of the averaged gradient; null: no clipping")
    not_finite: NotFiniteConfig = NotFiniteConfig()
    parallel: ParallelConfig = ParallelConfig()
    workers: WorkersConfig = WorkersConfig()
    checkpoint: CheckpointsConfig = CheckpointsConfig()
    loader: LoaderConfig = LoaderConfig()
    log_every: int = Field(10, ge=1, description="steps between two records in metrics.jsonl and TensorBoard")
    geometry: GeometryConfig | None = Field(
        None, description="alignment, uniformity, effective rank and scores of the embeddings, every so many steps"
    )
    callbacks: list[CallbackConfig] = Field([], description="registered callbacks, called in this order")

    @field_validator("model", mode="before")
    @classmethod
    def _named_model(cls, data: Any) -> Any:
        """`model: NAME`, or `model: {extends: NAME, ...}`, starts from a shipped model config."""
        if isinstance(data, str):
            data = {"extends": data}
        if isinstance(data, dict) and "extends" in data:
            fields = dict(data)
            return merge(load_tree("models", str(fields.pop("extends"))), fields)
        return data

    @model_validator(mode="before")
    @classmethod
    def _plain_corpora(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("corpora"), list):
            corpora = [{"path": item} if isinstance(item, str) else item for item in data["corpora"]]
            return {**data, "corpora": corpora}
        return data

    @model_validator(mode="after")
    def _fields_agree(self) -> TrainConfig:
        given = [name for name in ("steps", "samples", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) + " are" if given else "none of them is"
            raise ValueError(f"exactly one of steps, samples and epochs must be given, but {what}")
        if bool(self.corpus) == bool(self.corpora):
            what = "both are" if self.corpus else "neither is"
            raise ValueError(f"exactly one of corpus (a path) and corpora (a list) must be given, but {what}")
        if self.batch_size < self.workers.count:
            raise ValueError(f"batch_size ({self.batch_size}) must be at least workers.count ({self.workers.count})")
        if "://" in self.out:
            raise ValueError("out must be a local or shared folder; checkpoint.path may be a URL")
        return self

    @model_validator(mode="after")
    def _views_are_there(self) -> TrainConfig:
        """Teachers read views of the model; objectives read those and the teachers' own."""
        outputs = self.model.outputs
        views = [output for names in outputs.values() for output in names.values()]
        for name, teacher in self.teachers.items():
            if not name.isidentifier():
                raise ValueError(f"teachers: a name is letters, digits and underscores, not {name!r}")
            for view in teacher.views or []:
                if view not in self.model.each_view:
                    raise ValueError(
                        f"teachers.{name}.views names {view!r}, but the views of the model are {', '.join(outputs)}"
                    )
        for name, teacher in self.teachers.items():
            for output in (
                teacher_view(given, name)
                for view in teacher.views or self.model.each_view
                for given in (outputs[view].values() if teacher.kind == "ema" else [view])
            ):
                if output in views:
                    raise ValueError(f"teachers.{name} adds the view {output!r}, which there is already")
                views.append(output)
        for name, further in self.extra.items():
            if name in views:
                raise ValueError(f"extra.{name} has the name of a view")
            if "embedding" not in outputs.get(further.view, {}):
                raise ValueError(
                    f"extra.{name}.view names {further.view!r}, but the views that give embeddings are "
                    f"{', '.join(view for view, given in outputs.items() if 'embedding' in given)}"
                )
        objective = self.objective.model_dump()
        for place, view in _named(objective, "objective", ("views", "teacher_views")):
            if view not in views:
                raise ValueError(f"{place} names {view!r}, but the views are {', '.join(views)}")
        for place, name in _named(objective, "objective", ("extra",)):
            if name not in self.extra:
                have = ", ".join(self.extra) or "none"
                raise ValueError(f"{place} names {name!r}, but the further texts under extra are: {have}")
        return self

    @model_validator(mode="after")
    def _locks_fit(self) -> TrainConfig:
        for tower, lock in self.locked.items():
            if tower not in self.model.towers:
                raise ValueError(f"locked names the tower {tower!r}, but the towers are {', '.join(self.model.towers)}")
            if self.parallel.strategy != "ddp" and not isinstance(lock.trained_layers, (int, float)):
                raise ValueError(f"locked.{tower}: a lock that opens during the run needs parallel.strategy ddp")
        return self

    @property
    def corpus_paths(self) -> list[str]:
        return [self.corpus] if self.corpus else [corpus.path for corpus in self.corpora]

    @property
    def checkpoint_url(self) -> str:
        """Where the checkpoints are."""
        return self.checkpoint.path or f"{self.out.rstrip('/')}/checkpoints"

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        if self.samples is not None:
            return -(-self.samples // self.batch_size)
        assert self.epochs is not None
        return self.epochs * steps_per_epoch


def _named(fields: Any, place: str, among: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(field, name) for every name that an objective, or one within it, has in its fields of those names."""
    if not isinstance(fields, dict):
        return
    for name, value in fields.items():
        if name in among and isinstance(value, (list, tuple)):
            yield from ((f"{place}.{name}", view) for view in value if isinstance(view, str))
        yield from _named(value, f"{place}.{name}", among)
