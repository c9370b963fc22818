"""`clew download`: tables of URLs with captions -> a corpus that owns its images (see cl/corpus.py).

    result = download(DownloadConfig(inputs=["urls.parquet"], out="runs/corpus"))

A shard of rows is one idempotent task over Ray Data: fetched, written as a tar and a fragment, and recorded. A run that
is killed and started again fetches only what has no record. What cannot be had is in the quarantine with its reason.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

from pydantic import BaseModel, Field, model_validator

from cl import storage
from cl.config import Config
from cl.progress import progress
from cl.run import write_run_info
from cl.tombstones import refuse_unfinished_removal
from pipelines.fragments import commit, count_reasons, count_sources, make_fragments, refuse_foreign, run_tasks
from pipelines.images import MAX_PIXELS
from pipelines.inputs import find_tables
from pipelines.paths import absolute
from pipelines.web.fetch import FetchConfig
from pipelines.web.shards import DownloadTask, download_shard
from pipelines.web.tables import COLUMNS, TABLES, TableTask, check_table, cut_table


class DownloadConfig(Config):
    """What to download, and where to."""

    inputs: list[str] = Field(min_length=1, description="parquet, jsonl, csv or tsv files; folders, globs, URLs")
    out: str = Field(min_length=1, description="folder or URL of the corpus")
    source: str | None = Field(None, description="name of the data set; None: each file's name without its number")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="url, text -> columns of the table; key (else the row's number); sha256 or md5, which the bytes of "
        "an image must have",
    )
    shard_rows: int = Field(5000, ge=1, description="rows of a table in one shard, the unit that is done again")
    fetch: FetchConfig = Field(default_factory=FetchConfig, description="how hosts are asked")
    max_pixels: int = Field(MAX_PIXELS, gt=0, description="width x height above which an image is quarantined")
    chunk_bytes: int = Field(8 << 20, gt=0, description="bytes of a shard that are read at once later (a row group)")
    chunk_rows: int = Field(4096, gt=0, description="samples in a row group at most")
    cpus: int | None = Field(None, gt=0, description="CPUs of a local Ray; None: all")

    @model_validator(mode="after")
    def _known_columns(self) -> DownloadConfig:
        for name in self.columns:
            if name not in COLUMNS:
                raise ValueError(f"columns has {name!r}; accepted are {', '.join(COLUMNS)}")
        return self


class DownloadResult(BaseModel):
    """What came of a download."""

    out: str
    rows: int  # of all tables: samples + quarantined
    samples: int
    quarantined: int
    reasons: dict[str, int]  # reason -> rows, most frequent first
    sources: dict[str, int]  # source -> samples
    shards: int
    reused: int  # shards that were there from an earlier run
    seconds: float


def download(cfg: DownloadConfig) -> DownloadResult:
    """Fetch the images of the inputs and make a corpus of them.

    Raises:
        DataError: a path that does not exist, a missing column, nothing valid, a full disk.
        ConfigError: a Ray cluster that cannot be reached.
    """
    started = time.monotonic()
    out = absolute(cfg.out)
    refuse_foreign(out, "download")
    refuse_unfinished_removal(out)
    tables = find_tables(cfg.inputs, cfg.source)
    options = cfg.model_dump(include={"columns", "shard_rows"})
    cuts = [TableTask(number, table, options, out) for number, table in enumerate(tables)]
    check_table(tables[0], cfg.columns)  # before Ray starts; the other tables are checked by their own tasks
    with write_run_info(out, "download", cfg) as run, contextlib.ExitStack() as stack:
        if any(cut.done() is None for cut in cuts):  # both passes share one Ray; a finished run needs none
            from cluster.session import ray_session

            stack.enter_context(ray_session(num_cpus=cfg.cpus))
        tasks = _tasks(cfg, cuts, out)
        records, reused = make_fragments(tasks, DownloadTask.dump, _download, out, "Downloading", cfg.cpus)
        _forget_rows(out)
        corpus = commit(records, tasks, "image-text", out)
        result = DownloadResult(
            out=cfg.out.rstrip("/") or "/",
            rows=corpus.samples + corpus.quarantined,
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


def _tasks(cfg: DownloadConfig, cuts: list[TableTask], out: str) -> list[DownloadTask]:
    """The tasks of all tables, which are cut into shards first, as far as their rows are still to be fetched."""
    done = {cut.number: record for cut in cuts if (record := cut.done())}
    _cut_tables([cut for cut in cuts if cut.number not in done], done, cfg.cpus)
    tasks = _of_records(cfg, cuts, done, out)
    lost = {task.table for task in tasks if task.done() is None and not storage.exists(task.rows_url)}
    _cut_tables([cut for cut in cuts if cut.table in lost], done, cfg.cpus)
    return tasks


def _cut_tables(cuts: list[TableTask], done: dict[int, dict[str, Any]], cpus: int | None) -> None:
    """Cut tables over Ray, and add their records."""
    if cuts:
        with progress("Reading tables", total=len(cuts), unit="tables") as bar:
            for record in run_tasks([cut.dump() for cut in cuts], _cut, cpus):
                done[record["number"]] = record
                bar.advance(1)


def _of_records(
    cfg: DownloadConfig, cuts: list[TableTask], done: dict[int, dict[str, Any]], out: str
) -> list[DownloadTask]:
    options = cfg.model_dump(include={"max_pixels", "chunk_bytes", "chunk_rows", "fetch"}, mode="json")
    options |= {"kind": "image-text"}
    tasks: list[DownloadTask] = []
    for cut in cuts:
        for shard, rows in enumerate(done[cut.number]["shards"]):
            tasks.append(DownloadTask(len(tasks), cut.table, rows, cut.rows_url(shard), options, out))
    return tasks


def _cut(text: str) -> dict[str, Any]:
    return cut_table(TableTask.load(text))


def _download(text: str) -> dict[str, Any]:
    import ray

    task = DownloadTask.load(text)
    processes = max(math.floor(ray.cluster_resources().get("CPU", 1)), 1)  # a task takes one CPU
    return download_shard(task, processes)


def _forget_rows(out: str) -> None:
    """Delete the shards of rows: nothing needs them any more, and what `clew remove` takes out may be in them."""
    for name in storage.list_files(storage.join(out, TABLES), ".parquet"):
        fs, path = storage.open_fs(storage.join(out, TABLES, name))
        fs.rm(path)
