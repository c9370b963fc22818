"""Ingest: shards as they come -> a corpus (see cl/corpus.py), with everything unusable in its quarantine.

    result = ingest(IngestConfig(inputs=["shards/"], out="runs/corpus"))

Each shard is one idempotent task over Ray Data: it reads its shard once, writes one fragment of the light plane and one
of the quarantine, and leaves a record. A run that is killed and started again does only what has no record, and ends
with the same bytes; a finished one does nothing. Image bytes stay where they are.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from cl import storage
from cl.config import Config
from cl.corpus import Corpus, Fragment, Kind
from cl.errors import DataError
from cl.progress import progress
from cl.run import write_run_info
from cl.tombstones import refuse_unfinished_removal
from pipelines.images import MAX_PIXELS
from pipelines.inputs import Shard, find_shards
from pipelines.ray_data import prepare_ray_data
from pipelines.shards import RECORDS, Task, check_columns, ingest_shard

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "image-text": ("image", "text", "meta"),
    "text-text": ("anchor", "positive", "negatives", "key"),
}
BLOCKS_PER_CPU = 4  # more blocks balance better, but each costs tens of milliseconds


class IngestConfig(Config):
    """What to ingest, and where to."""

    inputs: list[str] = Field(min_length=1, description="tar, parquet or jsonl files; folders, globs, {000..127}, URLs")
    out: str = Field(min_length=1, description="folder or URL of the corpus")
    source: str | None = Field(None, description="name of the data set; None: each file's name without its number")
    kind: Literal["auto", "image-text", "text-text"] = Field(
        "auto", description="auto: tars are image-text, tables text-text"
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="tars: image, text, meta -> suffixes in order of preference ('jpg;png'; 'json.FIELD' for text); "
        "tables: anchor, positive, negatives, key -> column",
    )
    max_pixels: int = Field(MAX_PIXELS, gt=0, description="width x height above which an image is quarantined")
    chunk_bytes: int = Field(8 << 20, gt=0, description="bytes of a shard that are read at once later (a row group)")
    chunk_rows: int = Field(4096, gt=0, description="samples in a row group at most")
    cpus: int | None = Field(None, gt=0, description="CPUs of a local Ray; None: all")

    @model_validator(mode="after")
    def _known_columns(self) -> IngestConfig:
        allowed = {name for kind, names in COLUMNS.items() if self.kind in ("auto", kind) for name in names}
        if "image" in self.columns and {"anchor", "positive"} & set(self.columns):
            raise ValueError("columns has both image and anchor or positive; a corpus is of one kind")
        for name in self.columns:
            if name not in allowed:
                raise ValueError(f"columns has {name!r}; accepted are {', '.join(sorted(allowed))}")
        return self


class IngestResult(BaseModel):
    """What came of an ingest."""

    out: str
    kind: Kind
    samples: int
    quarantined: int
    reasons: dict[str, int]  # reason -> records in the quarantine, most frequent first
    sources: dict[str, int]  # source -> samples
    shards: int
    reused: int  # shards whose fragments were there from an earlier run
    seconds: float


def ingest(cfg: IngestConfig) -> IngestResult:
    """Make a corpus of the inputs.

    Raises:
        DataError: a path that does not exist, a missing column, nothing valid, a full disk.
        ConfigError: a Ray cluster that cannot be reached.
    """
    started = time.monotonic()
    shards, kind = find_shards(cfg.inputs, cfg.kind, cfg.source)
    for name in cfg.columns:
        if name not in COLUMNS[kind]:
            raise DataError(f"columns.{name} is not used for {kind}: accepted are {', '.join(COLUMNS[kind])}.")
    out = _root(cfg.out)
    _refuse_foreign(out)
    refuse_unfinished_removal(out)
    tasks = _tasks(cfg, shards, kind, out)
    check_columns(tasks[0])  # before Ray starts; the other tables are checked by their own tasks
    records = {task.number: record for task in tasks if (record := task.done())}
    pending = [task for task in tasks if task.number not in records]
    reused = len(records)
    with write_run_info(out, "ingest", cfg) as run:
        if pending:
            _uncommit(out)
            for folder in ("samples", "quarantine", RECORDS):
                storage.sweep_temporary(storage.join(out, folder))
            with progress("Ingesting", total=len(tasks), unit="shards") as bar:
                bar.advance(reused)
                for record in _run(pending, cfg.cpus):
                    records[record["number"]] = record
                    bar.advance(1, note=f"{sum(r['samples'] for r in records.values()):,} samples")
        corpus = _commit([records[task.number] for task in tasks], tasks, kind, out)
        result = _summarise(corpus, records, reused, out, time.monotonic() - started)
        run.add(result=result.model_dump())
    return result


def _root(out: str) -> str:
    return out.rstrip("/") or "/"


def _tasks(cfg: IngestConfig, shards: list[Shard], kind: Kind, out: str) -> list[Task]:
    options = cfg.model_dump(include={"columns", "max_pixels", "chunk_bytes", "chunk_rows"}) | {"kind": kind}
    absolute = storage.open_fs(out)[1] if storage.is_local(out) else out  # workers may run in another folder
    return [Task(number, shard, options, absolute) for number, shard in enumerate(shards)]


def _refuse_foreign(out: str) -> None:
    """Never write over what ingest has not made."""
    if storage.exists(storage.join(out, "corpus.json")) and not storage.exists(storage.join(out, RECORDS)):
        raise DataError(f"{out} holds a corpus that ingest did not make: choose another folder.")
    if (
        storage.exists(out)
        and not storage.list_files(storage.join(out, RECORDS))
        and storage.list_files(storage.join(out, "samples"))
    ):
        raise DataError(f"{out} holds a samples folder that ingest did not make: choose another folder.")


def _uncommit(out: str) -> None:
    """Take back the manifest while fragments change: a reader must not see old and new ones together."""
    fs, path = storage.open_fs(storage.join(out, "corpus.json"))
    if fs.exists(path):
        fs.rm(path)


def _run(tasks: list[Task], cpus: int | None) -> Iterator[dict[str, Any]]:
    """The records of the tasks in the order in which they end."""
    import orjson

    from cluster.session import ray_session

    with ray_session(num_cpus=cpus) as session:
        import ray.data

        prepare_ray_data()
        blocks = max(1, min(len(tasks), round(BLOCKS_PER_CPU * session.cpus)))
        items = [{"task": task.dump()} for task in tasks]
        records = ray.data.from_items(items, override_num_blocks=blocks).map_batches(_work, batch_size=1)
        for row in records.iter_rows():
            record = orjson.loads(row["record"])
            if "error" in record:
                raise DataError(record["error"])
            yield record


def _work(batch: dict[str, Any]) -> dict[str, list[str]]:
    """The Ray Data function: one task in, its record out.

    What the user can mend travels as data, as Ray Data drops the cause when it wraps an exception.
    """
    import orjson

    out = []
    for text in batch["task"]:
        try:
            record = ingest_shard(Task.load(text))
        except DataError as error:
            record = {"error": str(error)}
        out.append(orjson.dumps(record).decode())
    return {"record": out}


def _commit(records: list[dict[str, Any]], tasks: list[Task], kind: Kind, out: str) -> Corpus:
    """Check, sweep what older runs left, and write the manifest."""
    fragments = [
        Fragment(
            path=task.fragment_path(record),
            samples=record["samples"],
            shard=record["shard"],
            row_groups=record["row_groups"],
        )
        for task, record in zip(tasks, records, strict=True)
        if record["samples"]
    ]
    quarantined = sum(record["quarantined"] for record in records)
    corpus = Corpus(kind=kind, samples=sum(f.samples for f in fragments), quarantined=quarantined, fragments=fragments)
    _sweep(records, tasks, out)
    if corpus.samples == 0:
        reasons = _reasons(records)
        told = f"{quarantined} were quarantined ({', '.join(f'{n} {reason}' for reason, n in reasons.items())})"
        where = f"; see {storage.join(out, 'quarantine')}" if quarantined else ""
        raise DataError(
            f"No valid sample in {len(tasks)} shard{'s' if len(tasks) > 1 else ''}, first {tasks[0].shard.url}: "
            f"{told if quarantined else 'they are empty'}{where}."
        )
    corpus.write(out)
    return corpus


def _sweep(records: list[dict[str, Any]], tasks: list[Task], out: str) -> None:
    """Delete fragments of earlier runs that are not part of this one."""
    wanted = {task.record_path for task in tasks}
    wanted |= {task.fragment_path(record) for task, record in zip(tasks, records, strict=True) if record["samples"]}
    wanted |= {task.quarantine_path for task, record in zip(tasks, records, strict=True) if record["quarantined"]}
    for folder in ("samples", "quarantine", RECORDS):
        for name in storage.list_files(storage.join(out, folder)):
            if f"{folder}/{name}" not in wanted:
                fs, path = storage.open_fs(storage.join(out, folder, name))
                fs.rm(path)


def _reasons(records: list[dict[str, Any]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record["reasons"])
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _summarise(
    corpus: Corpus, records: dict[int, dict[str, Any]], reused: int, out: str, seconds: float
) -> IngestResult:
    ordered = [records[number] for number in sorted(records)]
    sources: Counter[str] = Counter()
    for record in ordered:
        sources[record["source"]] += record["samples"]
    return IngestResult(
        out=out,
        kind=corpus.kind,
        samples=corpus.samples,
        quarantined=corpus.quarantined,
        reasons=_reasons(ordered),
        sources=dict(sorted(sources.items())),
        shards=len(ordered),
        reused=reused,
        seconds=round(seconds, 3),
    )
