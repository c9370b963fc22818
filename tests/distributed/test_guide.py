"""The code of cl/README.md runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.objectives import OBJECTIVES, ObjectiveConfig, build_objective
from cl.pairs import Pairs

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "cl" / "README.md").read_text(), re.DOTALL)


def block(containing: str) -> str:
    (found,) = (text for text in BLOCKS if containing in text)
    return found


def test_torchrun_script_trains(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(block("init_process_group"))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", run.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 2


def test_own_objective_in_twenty_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    OBJECTIVES.entries()
    monkeypatch.setattr(
        OBJECTIVES, "_entries", dict(OBJECTIVES._entries)
    )  # what the guide registers ends with the test
    exec(compile(block("my-decoupled"), "guide", "exec"), {"__name__": "guide"})
    objective = build_objective(ObjectiveConfig.model_validate({"name": "my-decoupled", "tile_rows": 2})).double()
    torch.manual_seed(0)
    a, b = (normalize(torch.randn(5, 4, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2))
    loss = objective(Pairs({"image": a, "text": b}), Workers()).loss
    scores = a @ b.T / 0.07
    others = scores.masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
    expected = ((others.logsumexp(1) + others.logsumexp(0)) / 2 - scores.diagonal()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found: tuple[Tensor, ...] = torch.autograd.grad(loss, (a, b))
    for gradient, reference in zip(found, torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-9)


def test_cached_batch_equals_the_whole_one() -> None:
    guide: dict[str, Any] = {}
    exec(compile(block("CachedBatch(encode"), "guide", "exec"), guide)
    parameters = [*guide["towers"].parameters(), *guide["objective"].parameters()]
    found = [parameter.grad for parameter in parameters]
    whole = guide["encode"]({"image": guide["images"], "text": guide["texts"]}, ())
    outcome = guide["objective"](Pairs(whole), Workers())
    expected = torch.autograd.grad(outcome.loss, parameters)
    assert outcome.loss.item() == pytest.approx(guide["outcome"].loss.item(), rel=1e-6)
    for slope, right in zip(found, expected, strict=True):
        torch.testing.assert_close(slope, right, rtol=1e-3, atol=1e-6)
