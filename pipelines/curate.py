"""`clew curate`: a corpus and a list of stages in, a curated corpus ready for training out.

    result = curate(CurateConfig(corpus="runs/corpus", out="runs/curated", stages=[{"caption": {"min_words": 2}}]))

A run that was killed goes on where it stopped when it is started again, and ends with the same bytes as one that was
never interrupted; a finished run returns at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import yaml
from blake3 import blake3
from pydantic import BaseModel, Field, PlainSerializer, PlainValidator

from cl import storage
from cl.config import Config, config_digest, parse_config
from cl.corpus import Corpus, open_corpus
from cl.errors import ConfigError, DataError
from cl.run import write_run_info
from cl.tombstones import refuse_unfinished_removal, tombstones_digest
from pipelines.against import check_against, take_over
from pipelines.annotate import annotate, annotated_file, build_funnel, write_funnel
from pipelines.execute import execute, reduce_node
from pipelines.paths import absolute
from pipelines.placement import Placement, WriteConfig
from pipelines.plan import Plan, build_plan, dump_stages, parse_stages, segments
from pipelines.stages.base import Stage
from pipelines.stages.locate import Locate
from pipelines.stages.removed import Removed
from pipelines.view import write_view
from pipelines.write import carried, scatter, scatter_file, write_shards

Stages = Annotated[
    list[Stage], PlainValidator(parse_stages), PlainSerializer(dump_stages, return_type=list[dict[str, Any]])
]
PRODUCTS = ("annotated", "quarantine", "samples", "shards")  # folders of OUT that a run owns


class CurateConfig(Config):
    """A curation run."""

    corpus: str = Field(description="the corpus to curate: a folder or URL")
    out: str = Field(description="the folder or URL of the curated corpus and of what the run remembers")
    against: str | None = Field(
        None,
        description="a finished curation by the same stages: its thresholds, centroids and counts judge the samples, "
        "its kept ones stay and are duplicated by none; None: the samples are judged among themselves",
    )
    seed: int = Field(0, description="fixes every random choice")
    model: str | None = Field(None, description="Clew checkpoint or training run for stages that need a model")
    stages: Stages = Field(description="stages in order, each `name: {fields}`; see `clew stages`")
    write: WriteConfig = Field(default_factory=WriteConfig, description="layout of the curated corpus")
    cpus: int | None = Field(None, ge=1, description="CPUs of a local Ray; None: all cores")
    partitions: int | None = Field(
        None,
        ge=1,
        description="tasks a global step is spread over; None: one for 50,000 samples; changes no result",
    )


class CurateResult(BaseModel):
    """What a curation run did."""

    out: str
    samples_in: int
    kept: int
    dropped: dict[str, int]  # "stage/reason" -> samples
    quarantined: int
    shards: int
    resumed: bool  # whether the run had already been finished


def curate(cfg: CurateConfig) -> CurateResult:
    """Run the stages and write the curated corpus.

    Raises:
        ConfigError: the config cannot be run; raised before Ray starts.
        DataError: the corpus cannot be used, every sample was dropped, or the disk is full.
    """
    corpus = open_corpus(absolute(cfg.corpus))
    out = absolute(cfg.out)
    _check_places(corpus.root, out)
    refuse_unfinished_removal(out)
    frozen = None if cfg.against is None else finished_plan(absolute(cfg.against))
    plan, columns = _plan(cfg, corpus, out, frozen)
    if frozen is not None:
        check_against(plan, frozen)
    key = run_key(plan, cfg.write)
    if removed := tombstones_digest(out):  # what was removed from a finished run leaves it finished
        plan, columns = _plan(cfg, corpus, out, frozen, [Removed(root=out)])
        key = f"{key}:{removed}"
    finished = _finished(plan, key)
    if finished is not None:
        return finished
    try:
        with write_run_info(out, "curate", cfg) as info:
            _claim(out, key)
            result = _run(plan, columns, cfg, key)
            info.add(**result.model_dump(exclude={"out", "resumed"}))
    except KeyboardInterrupt:
        print(f"Interrupted. What was done is kept in {out}; the same command resumes it.", file=sys.stderr)
        raise
    return result


def _check_places(corpus: str, out: str) -> None:
    if out == corpus or out.startswith(f"{corpus}/"):
        raise ConfigError(f"out ({out}) must lie outside the corpus that is read ({corpus}).")
    if corpus.startswith(f"{out}/"):
        raise ConfigError(f"The corpus that is read ({corpus}) must lie outside out ({out}).")
    if storage.exists(out) and not storage.exists(storage.join(out, ".nodes")):
        fs, path = storage.open_fs(out)
        if not fs.isdir(path):
            raise ConfigError(f"out ({out}) is a file; give a folder.")
        record = storage.join(out, "run.json")
        ours = storage.exists(record) and storage.read_json(record).get("command") == "curate"
        if not ours and set(storage.list_files(out)) & {"corpus.json", "run.json"}:
            raise ConfigError(f"out ({out}) holds something that `clew curate` did not write; give another folder.")


def finished_plan(out: str) -> Plan:
    """The plan of a finished curation, from what is written in its folder.

    Raises:
        ConfigError: the folder is none of a curation, or its config cannot be run any more.
        DataError: it is not finished, or the corpus that it read is gone.
    """
    written = storage.join(out, "config.yaml")
    if not storage.exists(_marker(out)) or not storage.exists(written):
        raise ConfigError(f"against ({out}) is no folder of a curation that remembers what its stages found (.nodes).")
    refuse_unfinished_removal(out)
    open_corpus(out)
    fs, path = storage.open_fs(written)
    cfg = parse_config(CurateConfig, yaml.safe_load(fs.cat_file(path)), written)
    frozen = None if cfg.against is None else finished_plan(absolute(cfg.against))
    removed = [Removed(root=out)] if tombstones_digest(out) else []
    return _plan(cfg, open_corpus(absolute(cfg.corpus)), out, frozen, removed)[0]


def _plan(
    cfg: CurateConfig, corpus: Corpus, out: str, frozen: Plan | None = None, first: Sequence[Stage] = ()
) -> tuple[Plan, list[str]]:
    """The plan with the stages around the user's: what comes first, finding the bytes, and placing what is kept."""
    model = None if cfg.model is None else absolute(cfg.model)
    stages: list[Stage] = [stage for stage in cfg.stages if not isinstance(stage, Locate)]
    if corpus.kind == "image-text":
        stages.insert(0, Locate())
    stages = [*first, *stages]
    listed = build_plan(corpus, stages, out, cfg.seed, model)
    columns = carried(listed, cfg.write)
    complete = [*stages, Placement(settings=cfg.write)]
    return build_plan(corpus, complete, out, cfg.seed, model, cfg.partitions, frozen), columns


def run_key(plan: Plan, write: WriteConfig) -> str:
    """The key of everything that OUT holds."""
    keys = [node.key for node in plan.nodes]
    return blake3("\0".join([*keys, config_digest(write)]).encode()).hexdigest(length=16)


def corpus_lanes(plan: Plan, write: WriteConfig) -> int | None:
    """The number of lanes of the curated corpus."""
    return plan.corpus.lanes if write.view else write.lanes


def _marker(out: str) -> str:
    return storage.join(out, ".nodes", "current.json")


def _claim(out: str, key: str) -> None:
    """Make OUT's products belong to this run: those of another config are removed first, its manifest before all."""
    marker = _marker(out)
    if storage.exists(marker) and storage.read_json(marker).get("key") == key:
        return
    fs, root = storage.open_fs(out)
    for name in ("corpus.json", "funnel.json", *PRODUCTS):
        path = f"{root}/{name}"
        if fs.exists(path):
            fs.rm(path, recursive=True)
    storage.write_json(marker, {"key": key})


def _finished(plan: Plan, key: str) -> CurateResult | None:
    """The result of a run that is already whole, else None."""
    marker = _marker(plan.out)
    if not storage.exists(marker):
        return None
    state = storage.read_json(marker)
    manifest = storage.join(plan.out, "corpus.json")
    if state.get("key") != key or "result" not in state or not storage.exists(manifest):
        return None
    written = open_corpus(plan.out)
    files = [written.fragment_url(fragment) for fragment in written.fragments]
    files += [written.shard_url(fragment.shard) for fragment in written.fragments]
    files += [annotated_file(plan, number) for number in range(len(plan.corpus.fragments))]
    if not all(storage.exists(file) for file in files):
        return None
    return CurateResult(**state["result"] | {"resumed": True})


def _run(plan: Plan, columns: list[str], cfg: CurateConfig, key: str) -> CurateResult:
    from cluster.session import ray_session

    for folder in PRODUCTS:
        storage.sweep_temporary(storage.join(plan.out, folder))
    last = plan.nodes[-1].number
    take_over(plan)
    before = segments(plan)[:-1]  # the last one places what is kept
    with ray_session(num_cpus=cfg.cpus):
        notes = (lambda number: annotated_file(plan, number), lambda number: annotate(plan, number))
        splits = (lambda number: scatter_file(plan, number), lambda number: scatter(plan, number, columns))
        execute(plan, {len(before) - 1: [notes]}, stop=len(before))
        funnel = build_funnel(plan)
        write_funnel(plan, funnel)
        dropped = {f"{s['stage']}/{why}": n for s in funnel["stages"] for why, n in s["dropped"].items()}
        if not funnel["kept"]:
            most = ", ".join(f"{count} {why}" for why, count in sorted(dropped.items(), key=lambda each: -each[1])[:4])
            broken = f"; {funnel['quarantined']} quarantined" if funnel["quarantined"] else ""
            raise DataError(f"No sample of {plan.corpus.root} was kept: {most or 'none dropped'}{broken}.")
        if cfg.write.view:
            shards = write_view(plan, columns)
        else:
            reduce_node(plan, last)
            execute(plan, {len(before): [splits]}, start=len(before))
            shards = write_shards(plan, columns)
    storage.sweep_temporary(plan.out, deep=True)  # of workers that died while the run went on
    manifest = Corpus(
        kind=plan.corpus.kind,
        samples=sum(fragment.samples for fragment in shards),
        quarantined=funnel["quarantined"],
        lanes=corpus_lanes(plan, cfg.write),
        fragments=shards,
    )
    if manifest.samples != funnel["kept"]:
        raise DataError(f"{manifest.samples} samples were written, but {funnel['kept']} were kept; delete {plan.out}.")
    manifest.write(plan.out)
    result = CurateResult(
        out=plan.out,
        samples_in=funnel["in"],
        kept=funnel["kept"],
        dropped=dropped,
        quarantined=funnel["quarantined"],
        shards=len(shards),
        resumed=False,
    )
    storage.write_json(_marker(plan.out), {"key": key, "result": result.model_dump()})
    return result
