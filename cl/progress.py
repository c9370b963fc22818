"""Progress of long steps: a bar with rate and time left on a terminal, a plain line now and then elsewhere.

    with progress("Ingesting", total=12, unit="shards") as bar:
        for shard in shards:
            bar.advance(1, note=f"{kept} kept")

Everything goes to stderr, so that stdout stays free for results. `CLEW_QUIET=1` (which `--json` sets) silences it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal
_lock = threading.RLock()
_live: rich.progress.Progress | None = None  # shared by bars that overlap: rich draws one live region at a time
_live_users = 0


def quiet() -> bool:
    """Whether the user asked for no progress."""
    return os.environ.get("CLEW_QUIET", "") not in ("", "0")


class Bar:
    """Counts what is done of a step; this one draws nothing."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.note = ""
        self.started = time.monotonic()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """`count` more units are done; `note` replaces the words behind the bar."""
        self.update(self.done + count, note=note)

    def update(self, done: int | None = None, total: int | None = None, note: str | None = None) -> None:
        """Set what is done, or a total that became known late, or the words behind the bar."""
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        self.note = self.note if note is None else note
        self._show()

    def finish(self) -> None:
        """Called once when the block ends, also by an error."""

    def _show(self) -> None:
        pass

    def rate(self) -> float:
        """Units a second since the start."""
        return self.done / max(time.monotonic() - self.started, 1e-9)


class _PlainBar(Bar):
    """A line at most every `PLAIN_SECONDS`, and one at the end."""

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        super().__init__(title, total, unit)
        self._printed = self.started

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            left = ""
            if self.total and self.done:
                left = f", {_duration((self.total - self.done) / max(self.rate(), 1e-9))} left"
            self._print(f"{self._count()}, {_rate(self.rate())} {self.unit}/s{left}")

    def finish(self) -> None:
        seconds = time.monotonic() - self.started
        self._print(f"{self._count()} in {_duration(seconds)} ({_rate(self.rate())} {self.unit}/s)")

    def _count(self) -> str:
        return f"{self.done:,}" + (f" of {self.total:,}" if self.total else "") + f" {self.unit}"

    def _print(self, text: str) -> None:
        note = f" - {self.note}" if self.note else ""
        print(f"{self.title}: {text}{note}", file=sys.stderr, flush=True)


class _RichBar(Bar):
    """A task in the shared live region."""

    def __init__(self, title: str, total: int | None, unit: str, live: rich.progress.Progress) -> None:
        super().__init__(title, total, unit)
        self._live = live
        self._task = live.add_task(title, total=total, unit=unit, note="")

    def _show(self) -> None:
        self._live.update(self._task, completed=self.done, total=self.total, note=self.note)

    def finish(self) -> None:
        self._live.stop_task(self._task)


@contextlib.contextmanager
def progress(title: str, total: int | None = None, unit: str = "samples") -> Iterator[Bar]:
    """Show the progress of the block.

    Args:
        title: what is being done ("Ingesting").
        total: how many units there are, or None if that is not known (yet).
        unit: what is counted, in the plural.
    """
    if quiet():
        yield Bar(title, total, unit)
    elif sys.stderr.isatty():
        with _live_region() as live:
            yield from _until_finished(_RichBar(title, total, unit, live))
    else:
        yield from _until_finished(_PlainBar(title, total, unit))


def _until_finished(bar: Bar) -> Iterator[Bar]:
    try:
        yield bar
    finally:
        bar.finish()


@contextlib.contextmanager
def _live_region() -> Iterator[rich.progress.Progress]:
    global _live, _live_users
    with _lock:
        if _live is None:
            _live = _new_live()
            _live.start()
        _live_users += 1
        live = _live
    try:
        yield live
    finally:
        with _lock:
            _live_users -= 1
            if _live_users == 0:
                live.stop()
                _live = None


def _new_live() -> rich.progress.Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Count(ProgressColumn):
        """Done, total and rate with the task's own unit."""

        def render(self, task: Task) -> Text:
            total = f"/{int(task.total):,}" if task.total else ""
            speed = task.finished_speed or task.speed
            rate = f", {_rate(speed)}/s" if speed else ""
            return Text(f"{int(task.completed):,}{total} {task.fields['unit']}{rate}", style="progress.download")

    return Progress(
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        Count(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=Console(stderr=True),
        refresh_per_second=4,
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
