"""Shows a run's progress by reading what its workers write: metrics.jsonl and train.log.

The workers may be processes on other machines; the folder of the run is what they share with the command.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import orjson

from cl.progress import Bar, progress

logger = logging.getLogger(__name__)

LOG = "train.log"
SECONDS = 0.5  # between two looks


class _Tail:
    """The lines that are appended to a file, whole ones only."""

    def __init__(self, path: Path, from_end: bool) -> None:
        self.path = path
        self.at = path.stat().st_size if from_end and path.exists() else 0

    def lines(self) -> list[bytes]:
        try:
            size = self.path.stat().st_size
            self.at = 0 if size < self.at else self.at  # cut back by a resume: read it again
            with open(self.path, "rb") as file:
                file.seek(self.at)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self.at += len(whole)
        return whole.splitlines()


@contextlib.contextmanager
def watch(out: str, total_steps: int, batch_size: int, relay_log: bool) -> Iterator[None]:
    """Show the progress of the run in `out` for the length of the block.

    Args:
        out: folder of the run.
        total_steps: steps of the whole run.
        batch_size: samples a step, to show samples a second.
        relay_log: repeat what workers write to train.log through this process's logging.
    """
    done = threading.Event()
    metrics = _Tail(Path(out) / "metrics.jsonl", from_end=False)
    log = _Tail(Path(out) / LOG, from_end=True)

    def look(bar: Bar) -> None:
        for line in log.lines() if relay_log else ():
            logger.warning("%s", line.decode(errors="replace"))
        records = metrics.lines()
        if records:
            with contextlib.suppress(orjson.JSONDecodeError, KeyError):
                record = orjson.loads(records[-1])
                bar.update(
                    record["step"], note=f"loss {record['loss']:.3f}, {record['samples_per_second']:,.0f} samples/s"
                )

    with progress("Training", total=total_steps, unit="steps") as bar:

        def run() -> None:
            while not done.wait(SECONDS):
                look(bar)

        thread = threading.Thread(target=run, name="clew-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            look(bar)


@contextlib.contextmanager
def log_to_folder(out: str) -> Iterator[None]:
    """Append what this process logs below `cl` to the run's train.log, for the command to show."""
    root = logging.getLogger("cl")
    handler = logging.FileHandler(Path(out) / LOG, delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
