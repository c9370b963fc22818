"""How a corpus is made fragment by fragment: what is missing is done over Ray Data, then one commit.

    records, reused = make_fragments(tasks, IngestTask.dump, work, out, "Ingesting", cpus=None)
    corpus = commit(records, tasks, "image-text", out)

A task (`pipelines.shards.Task`) is idempotent and leaves a record, so that a run that is killed and started again does
only what has no record, and ends with the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from cl import storage
from cl.corpus import Corpus, Fragment, Kind
from cl.errors import DataError
from cl.progress import progress
from pipelines.ray_data import prepare_ray_data
from pipelines.shards import RECORDS, Task

BLOCKS_PER_CPU = 4  # more blocks balance better, but each costs tens of milliseconds
T = TypeVar("T", bound=Task)
Work = Callable[[str], dict[str, Any]]  # from a task's text to its record; a function of a module


def refuse_foreign(out: str, command: str) -> None:
    """Never write over what another command has made.

    Raises:
        DataError: the folder holds a corpus, or parts of one, of another command.
    """
    record = storage.join(out, "run.json")
    maker = storage.read_json(record).get("command") if storage.exists(record) else None
    made = bool(storage.list_files(storage.join(out, RECORDS)))
    if made and maker in ("ingest", "download") and maker != command:
        raise DataError(f"{out} holds a corpus that `clew {maker}` made: choose another folder.")
    if not made and storage.exists(storage.join(out, "corpus.json")):
        raise DataError(f"{out} holds a corpus that {command} did not make: choose another folder.")
    if not made and storage.exists(out) and storage.list_files(storage.join(out, "samples")):
        raise DataError(f"{out} holds a samples folder that {command} did not make: choose another folder.")


def make_fragments(
    tasks: Sequence[T], texts: Callable[[T], str], work: Work, out: str, title: str, cpus: int | None
) -> tuple[dict[int, dict[str, Any]], int]:
    """The records of all tasks by number, and how many were there already; Ray starts only if one is missing.

    Args:
        texts: a task as text, for the worker.
        work: what a worker does with that text.
        title: of the progress bar.
        cpus: of a local Ray.
    """
    records = {task.number: record for task in tasks if (record := task.done())}
    pending = [task for task in tasks if task.number not in records]
    reused = len(records)
    if pending:
        _uncommit(out)
        for folder in ("samples", "quarantine", "shards", RECORDS):
            storage.sweep_temporary(storage.join(out, folder))
        with progress(title, total=len(tasks), unit="shards") as bar:
            bar.advance(reused)
            for record in run_tasks([texts(task) for task in pending], work, cpus):
                records[record["number"]] = record
                bar.advance(1, note=f"{sum(r['samples'] for r in records.values()):,} samples")
    return records, reused


def _uncommit(out: str) -> None:
    """Take back the manifest while fragments change: a reader must not see old and new ones together."""
    fs, path = storage.open_fs(storage.join(out, "corpus.json"))
    if fs.exists(path):
        fs.rm(path)


def run_tasks(texts: Sequence[str], work: Work, cpus: int | None) -> Iterator[dict[str, Any]]:
    """The records of tasks in the order in which they end.

    Raises:
        DataError: the first that a task raised.
    """
    import orjson

    from cluster.session import ray_session

    with ray_session(num_cpus=cpus) as session:
        import ray.data

        prepare_ray_data()
        blocks = max(1, min(len(texts), round(BLOCKS_PER_CPU * session.cpus)))
        items = [{"task": text} for text in texts]
        records = ray.data.from_items(items, override_num_blocks=blocks).map_batches(_over_batches(work), batch_size=1)
        for row in records.iter_rows():
            record = orjson.loads(row["record"])
            if "error" in record:
                raise DataError(record["error"])
            yield record


def _over_batches(work: Work) -> Callable[[dict[str, Any]], dict[str, list[str]]]:
    """The Ray Data function: one task in, its record out.

    What the user can mend travels as data, as Ray Data drops the cause when it wraps an exception.
    """

    def call(batch: dict[str, Any]) -> dict[str, list[str]]:
        import orjson

        out = []
        for text in batch["task"]:
            try:
                record = work(str(text))
            except DataError as error:
                record = {"error": str(error)}
            out.append(orjson.dumps(record).decode())
        return {"record": out}

    return call


def commit(records: dict[int, dict[str, Any]], tasks: Sequence[Task], kind: Kind, out: str) -> Corpus:
    """Check, sweep what older runs left, and write the manifest.

    Raises:
        DataError: there is no valid sample.
    """
    made = [(task, records[task.number]) for task in tasks]
    fragments = [
        Fragment(
            path=task.fragment_path(record),
            samples=record["samples"],
            shard=record["shard"],
            row_groups=record["row_groups"],
        )
        for task, record in made
        if record["samples"]
    ]
    quarantined = sum(record["quarantined"] for record in records.values())
    corpus = Corpus(kind=kind, samples=sum(f.samples for f in fragments), quarantined=quarantined, fragments=fragments)
    _sweep(made, out)
    if corpus.samples == 0:
        reasons = count_reasons(records)
        told = f"{quarantined} were quarantined ({', '.join(f'{n} {reason}' for reason, n in reasons.items())})"
        where = f"; see {storage.join(out, 'quarantine')}" if quarantined else ""
        raise DataError(
            f"No valid sample in {len(tasks)} shard{'s' if len(tasks) > 1 else ''}, first {tasks[0].shard.url}: "
            f"{told if quarantined else 'they are empty'}{where}."
        )
    corpus.write(out)
    return corpus


def _sweep(made: Sequence[tuple[Task, dict[str, Any]]], out: str) -> None:
    """Delete files of earlier runs that are not part of this one."""
    wanted = {path for task, record in made for path in (task.record_path, *task.products(record))}
    for folder in ("samples", "quarantine", "shards", RECORDS):
        for name in storage.list_files(storage.join(out, folder)):
            if f"{folder}/{name}" not in wanted:
                fs, path = storage.open_fs(storage.join(out, folder, name))
                fs.rm(path)


def count_reasons(records: dict[int, dict[str, Any]]) -> dict[str, int]:
    """Reason -> records in the quarantine, the most frequent first."""
    counts: Counter[str] = Counter()
    for record in records.values():
        counts.update(record["reasons"])
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def count_sources(records: dict[int, dict[str, Any]]) -> dict[str, int]:
    """Source -> samples."""
    counts: Counter[str] = Counter()
    for record in records.values():
        counts[record["source"]] += record["samples"]
    return dict(sorted(counts.items()))
