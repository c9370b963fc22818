"""What a run writes about itself: `run.json` (command, versions, seed, host, times, status) and `config.yaml`.

    with write_run_info(cfg.out, "train", cfg) as info:
        ...
        info.add(steps=steps)

`run.json` is written when the block starts (status `running`) and again when it ends: `finished`, `failed` with the
error's sentence, or `interrupted`. A folder therefore always tells what happened in it, even after a kill.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from importlib import metadata
from types import TracebackType
from typing import Any

from pydantic import BaseModel

import cl
from cl import storage
from cl.config import config_digest, dump_config
from cl.errors import user_error

PACKAGES = ("torch", "ray", "open_clip_torch", "transformers", "numpy", "pyarrow", "polars", "faiss-cpu")


def versions() -> dict[str, str]:
    """Versions of Python, Clew and the engines under it; a package that is not installed is left out."""
    found = {"python": platform.python_version(), "clew": cl.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class RunInfo:
    """The contents of a run's `run.json`, kept up to date while the run goes on."""

    def __init__(self, out_dir: str, command: str, config: BaseModel | None) -> None:
        self.out_dir = str(out_dir)
        self._clock = time.monotonic()
        self.fields: dict[str, Any] = {
            "command": command,
            "status": "running",
            "started": _now(),
            "finished": None,
            "seconds": None,
            "seed": getattr(config, "seed", None),
            "config_digest": config_digest(config) if config is not None else None,
            "versions": versions(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        }

    def add(self, **fields: Any) -> None:
        """Add results to `run.json` and write it."""
        self.fields.update(fields)
        self.write()

    def write(self) -> None:
        storage.write_json(storage.join(self.out_dir, "run.json"), self.fields)

    def finish(self, status: str = "finished", error: str | None = None) -> None:
        """Close the run: its end, its length in seconds, its status, and the sentence of its error if it failed."""
        self.fields.update(status=status, finished=_now(), seconds=round(time.monotonic() - self._clock, 3))
        if error is not None:
            self.fields["error"] = error
        self.write()

    def __enter__(self) -> RunInfo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, KeyboardInterrupt):
            self.finish("interrupted")
        else:
            cause = user_error(error) or error
            try:
                self.finish("failed", f"{type(cause).__name__}: {cause}")
            except Exception as unwritable:  # a full disk must not hide the error that the user has to see
                error.add_note(f"run.json could not be closed: {unwritable}")


def write_run_info(out_dir: str, command: str, config: BaseModel | None = None) -> RunInfo:
    """Write `run.json` and `config.yaml` into `out_dir` and return the run's open record.

    Raises:
        DataError: `out_dir` cannot be written.
    """
    info = RunInfo(out_dir, command, config)
    if config is not None:
        storage.write_bytes(storage.join(info.out_dir, "config.yaml"), dump_config(config).encode())
    info.write()
    return info
