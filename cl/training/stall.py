"""Says who holds a run up: a step that takes too long is explained by the workers themselves.

Every worker leaves a note of itself in OUT/workers when it starts. A thread beside the training looks at how long the
present step has taken; after `seconds` it adds to the note where the worker is. A moment later the first of the workers
that have done so tells in one sentence who has not (stopped, swapped out, cut off), who is busy where, and who only
waits for the others. Nothing is sent between workers: what holds them up may be what would carry the message.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from types import FrameType, TracebackType

from cl import storage
from cl.errors import ClewError
from cl.training.watch import log_to_folder

logger = logging.getLogger(__name__)

FOLDER = "workers"
GRACE = 3.0  # seconds for the others to notice, too


class StallWatch:
    """Watches the steps of the thread that makes it.

    Args:
        out: folder of the run, which all workers share.
        rank, world: this worker and how many there are.
        seconds: how long a step may take.
    """

    def __init__(self, out: str, rank: int, world: int, seconds: float) -> None:
        self.out, self.rank, self.world, self.seconds = out, rank, world, seconds
        self._thread = threading.get_ident()
        self._step, self._since, self._told = 0, time.monotonic(), False
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="clew-stall", daemon=True)

    def __enter__(self) -> StallWatch:
        self._write({})
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._watcher.join()

    def beat(self, step: int) -> None:
        """A step begins."""
        self._step, self._since, self._told = step, time.monotonic(), False

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            if self._told or time.monotonic() - self._since < self.seconds:
                continue
            step, self._told = self._step, True
            with contextlib.suppress(OSError, ClewError):  # a full disk is told by who needs it
                self._write({"step": step, **whereabouts(self._thread)})
                if not self._stop.wait(GRACE) and self._step == step:
                    self._tell(step)

    def _tell(self, step: int) -> None:
        notes = {rank: self._read(rank) for rank in range(self.world)}
        answered = {rank: note for rank, note in notes.items() if note.get("step") == step}
        if min(answered, default=-1) != self.rank:
            return
        # Without a note a worker has not come so far, or its folder is on another machine.
        missing = {rank: note for rank, note in notes.items() if rank not in answered}
        said = [
            f"{_name(rank, note)} {'does not answer' if note else 'left no note'}" for rank, note in missing.items()
        ]
        busy = {rank: note for rank, note in answered.items() if not note["waits"]}
        said += [f"{_name(rank, note)} is in {note['where']}" for rank, note in busy.items()]
        waiting = [(rank, note) for rank, note in answered.items() if note["waits"]]
        if waiting:
            rank, note = waiting[0]
            others = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
            said.append(f"{_name(rank, note)}{others} waits for the others in {note['where']}")
        sentence = f"Step {step} has taken {time.monotonic() - self._since:.0f} s: {'; '.join(said)}."
        # What the first worker logs is shown to the user; the others' goes the same way.
        with contextlib.nullcontext() if self.rank == 0 else log_to_folder(self.out):
            logger.warning("%s", sentence)

    def _path(self, rank: int) -> str:
        return storage.join(self.out, FOLDER, f"rank-{rank}.json")

    def _write(self, state: dict[str, object]) -> None:
        storage.write_json(self._path(self.rank), {"host": socket.gethostname(), "process": os.getpid(), **state})

    def _read(self, rank: int) -> dict[str, object]:
        path = self._path(rank)
        return storage.read_json(path) if storage.exists(path) else {}


def _name(rank: int, note: dict[str, object]) -> str:
    if not note:
        return f"worker {rank}"
    return f"worker {rank} (process {note['process']} on {note['host']})"


def whereabouts(thread: int) -> dict[str, object]:
    """`where`: file, line and function of the innermost frame of a thread that is neither torch's nor Python's own;
    `waits`: whether it is in a collective.
    """
    frame: FrameType | None = sys._current_frames().get(thread)
    waits = False
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        waits = waits or module.startswith("torch.distributed")
        root = module.partition(".")[0]
        if root != "torch" and root not in sys.stdlib_module_names:
            file = "/".join(frame.f_code.co_filename.split(os.sep)[-3:])
            return {"where": f"{file}:{frame.f_lineno} ({frame.f_code.co_name})", "waits": waits}
        frame = frame.f_back
    return {"where": "no code of its own", "waits": waits}
