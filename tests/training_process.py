"""`clew train` as a process of its own that a test can watch and kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from cl.training.metrics import read_metrics
from tests.end_to_end.clew import PATIENCE, environment


class TrainProcess:
    """A running `clew train CONFIG`.

    Args:
        folder: where the config is written and the command is run.
        fields: the config.
        words: further words of the command line.
    """

    def __init__(self, folder: Path, fields: dict[str, Any], *words: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.yaml").write_text(yaml.safe_dump(fields))
        self.metrics = Path(fields["out"]) / "metrics.jsonl"
        self.errors = folder / f"stderr-{time.monotonic_ns()}"
        with open(self.errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cl.cli", "train", "train.yaml", *words],
                cwd=folder,
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # a signal to it is not one to the test
            )
        self.family: dict[int, psutil.Process] = {}

    @property
    def stderr(self) -> str:
        return self.errors.read_text()

    def step(self) -> int:
        """The last step that is logged."""
        records = read_metrics(self.metrics)
        return records[-1]["step"] if records else 0

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Wait until something has happened; fails if the command ends before."""
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, f"clew train ended with {self.process.returncode}:\n{self.stderr}"
            assert time.monotonic() < end, f"nothing happened in {PATIENCE} s:\n{self.stderr}"
            time.sleep(0.02)

    def workers(self) -> list[psutil.Process]:
        """The Ray Train workers."""
        found = []
        for process in self.remember():
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def remember(self) -> list[psutil.Process]:
        """Note every process below the command, to see later whether it has ended."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.family |= {process.pid: process for process in below}
        return below

    def finish(self, seconds: float = PATIENCE) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def left(self, seconds: float = 60) -> list[str]:
        """Names of processes below the command that are still there."""
        _, alive = psutil.wait_procs(list(self.family.values()), timeout=seconds)
        found = []
        for process in alive:
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline())[:120])
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self) -> None:
        """End the command and everything below it, whatever state the test is in."""
        if self.process.poll() is None:
            self.remember()
            os.kill(self.process.pid, 9)
            self.process.wait()
        for process in self.family.values():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
