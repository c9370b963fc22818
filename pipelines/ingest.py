"""Ingest: shards as they come -> a corpus (see cl/corpus.py), with everything unusable in its quarantine.

    result = ingest(IngestConfig(inputs=["shards/"], out="runs/corpus"))

Each shard is one idempotent task over Ray Data: it reads its shard once, writes one fragment of the light plane and one
of the quarantine, and leaves a record. A run that is killed and started again does only what has no record, and ends
with the same bytes; a finished one does nothing. Image bytes stay where they are.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from cl.config import Config
from cl.corpus import Kind
from cl.errors import DataError
from cl.run import write_run_info
from cl.tombstones import refuse_unfinished_removal
from pipelines.fragments import commit, count_reasons, count_sources, make_fragments, refuse_foreign
from pipelines.images import MAX_PIXELS
from pipelines.inputs import find_shards
from pipelines.paths import absolute
from pipelines.shards import IngestTask, check_columns, ingest_shard

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "image-text": ("image", "text", "meta"),
    "text-text": ("anchor", "positive", "negatives", "key"),
}


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
    out = absolute(cfg.out)
    tasks, kind = ingest_tasks(cfg)
    refuse_foreign(out, "ingest")
    refuse_unfinished_removal(out)
    check_columns(tasks[0])  # before Ray starts; the other tables are checked by their own tasks
    with write_run_info(out, "ingest", cfg) as run:
        records, reused = make_fragments(tasks, IngestTask.dump, _work, out, "Ingesting", cfg.cpus)
        corpus = commit(records, tasks, kind, out)
        result = IngestResult(
            out=cfg.out.rstrip("/") or "/",
            kind=corpus.kind,
            samples=corpus.samples,
            quarantined=corpus.quarantined,
            reasons=count_reasons(records),
            sources=count_sources(records),
            shards=len(tasks),
            reused=reused,
            seconds=round(time.monotonic() - started, 3),
        )
        run.add(result=result.model_dump())
    return result


def ingest_tasks(cfg: IngestConfig) -> tuple[list[IngestTask], Kind]:
    """The work of an ingest, one task a shard, and the kind of corpus.

    Raises:
        DataError: a path that does not exist, or a setting that is not of this kind.
    """
    shards, kind = find_shards(cfg.inputs, cfg.kind, cfg.source)
    for name in cfg.columns:
        if name not in COLUMNS[kind]:
            raise DataError(f"columns.{name} is not used for {kind}: accepted are {', '.join(COLUMNS[kind])}.")
    options = cfg.model_dump(include={"columns", "max_pixels", "chunk_bytes", "chunk_rows"}) | {"kind": kind}
    out = absolute(cfg.out)
    return [IngestTask(number, shard, options, out) for number, shard in enumerate(shards)], kind


def _work(text: str) -> dict[str, Any]:
    return ingest_shard(IngestTask.load(text))
