"""Every command in the README runs, in its order, in a fresh copy of the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.clew import ROOT, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_commands_are_of_kinds_that_are_run_here_or_elsewhere() -> None:
    assert {line.split()[0] for line in COMMANDS} == {"make", "pip", "clew"}
    names = {line.split()[1] for line in COMMANDS if line.startswith("clew ")}
    assert {"ingest", "curate", "train", "eval", "sweep", "embed", "report", "doctor"} <= names


def test_every_link_and_every_path_of_the_tree_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    tree = README.split("## Where things are")[1]
    folder = ""
    for line in re.findall(r"^```\n(.*?)^```$", tree, re.MULTILINE | re.DOTALL)[0].splitlines():
        name = line.split()[0]
        folder = name if not line.startswith(" ") else folder
        assert (ROOT / (name if name == folder else folder + name)).exists(), line


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_command_runs(tmp_path: Path) -> None:
    """`make` and `pip` set up environments and are left to the tests of packaging; here `make` must know its target.

    A third of the sample's training shards stands for all of them.
    """
    for entry in ("configs", "Makefile", "pyproject.toml"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    sample = Path("pipelines/sample")
    (tmp_path / sample / "train").mkdir(parents=True)
    for entry in ("heldout", "text", "train/clipart-00001.tar", "train/planted-truncated-00000.tar"):
        (tmp_path / sample / entry).symlink_to(ROOT / sample / entry)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "clew").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cl.cli "$@"\n')
    (programs / "clew").chmod(0o755)
    env = environment()
    env["PATH"] = f"{programs}:{env['PATH']}"
    for line in COMMANDS:
        program, *_ = line.split()
        start = time.monotonic()
        if program == "pip":
            continue
        command = line.replace("make ", "make --dry-run ") if program == "make" else line
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        print(f"{time.monotonic() - start:7.1f} s  {line}")
    assert (tmp_path / "runs" / "report.html").stat().st_size > 100_000
