"""Run `clew` as a user does: a process of its own, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Seconds until something that is waited for counts as hanging: many times what it takes, as Ray alone may need minutes
# to start on a machine that has much else to do.
PATIENCE = 500


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user's shell in which this checkout can be imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CLEW_", "RAY_"))}
    path = os.pathsep.join(filter(None, [str(ROOT), extra.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]))
    return {**kept, "PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **extra}


def clew(*words: str, cwd: Path | str, timeout: float = PATIENCE, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `clew WORDS...` and return its exit code and output; `extra` are environment variables."""
    command = [sys.executable, "-m", "cl.cli", *words]
    return subprocess.run(
        command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=timeout, check=False
    )


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence of a command that was refused: exit code 2, nothing else on stderr, nothing on stdout."""
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("clew: ")
    assert done.stdout == ""
    return lines[0].removeprefix("clew: ")
