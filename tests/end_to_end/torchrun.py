"""Run a module of the tests under torchrun, as a user starts training: processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.end_to_end.clew import ROOT, environment

Weights = dict[str, Tensor]


def train(module: str, workers: int, runs: Sequence[Any], out: Path, *words: str) -> dict[str, Weights]:
    """Start `module RUNS.json WORDS... OUT` in `workers` processes; returns the weights of every run by its name."""
    out.mkdir()
    listed = out / "runs.json"
    listed.write_text(json.dumps([asdict(run) for run in runs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    done = subprocess.run(
        [*command, "-m", module, str(listed), *words, str(out)],
        cwd=ROOT,
        env=environment(HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {run.name: load_file(out / f"{run.name}.safetensors") for run in runs}


def assert_equal(found: Weights, expected: Weights) -> None:
    """Equal up to the rounding of float64 over a few steps."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        try:
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def movement(found: Weights, start: Weights) -> Weights:
    """How far every floating weight has moved."""
    return {name: value - start[name] for name, value in found.items() if value.is_floating_point()}
