"""Progress lines, run records and how results are printed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cl import console, progress, storage
from cl.config import Config
from cl.errors import DataError
from cl.run import write_run_info


class Small(Config):
    seed: int = 5


@pytest.fixture
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLEW_QUIET", raising=False)


@pytest.mark.usefixtures("loud")
def test_without_a_terminal_progress_is_a_line_now_and_then(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with progress.progress("Reading", total=4, unit="shards") as bar:
        bar.advance(1)
        bar.advance(3, note="3 kept")
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("Reading: 1 of 4 shards, ")
    assert " left" in lines[0]
    assert lines[-1].startswith("Reading: 4 of 4 shards in ")
    assert lines[-1].endswith(" - 3 kept")


@pytest.mark.usefixtures("loud")
def test_lines_are_rare(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.progress("Reading", total=1000) as bar:
        for _ in range(1000):
            bar.advance()
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_quiet_progress_says_nothing_but_counts(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLEW_QUIET", "1")
    with progress.progress("Reading") as bar:
        bar.advance(2)
        bar.update(total=9)
    assert (bar.done, bar.total) == (2, 9)
    assert capfd.readouterr() == ("", "")


def test_run_info_tells_how_a_run_ended(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    with write_run_info(out, "train", Small()) as info:
        during = storage.read_json(f"{out}/run.json")
        assert (during["status"], during["finished"]) == ("running", None)
        info.add(steps=3)
    after = storage.read_json(f"{out}/run.json")
    assert (after["status"], after["steps"], after["seed"], after["command"]) == ("finished", 3, 5, "train")
    assert after["versions"]["torch"]
    assert after["seconds"] >= 0
    assert "seed: 5" in Path(out, "config.yaml").read_text()

    with pytest.raises(DataError), write_run_info(out, "train", Small()):
        raise DataError("Corpus x does not exist.")
    failed = storage.read_json(f"{out}/run.json")
    assert (failed["status"], failed["error"]) == ("failed", "DataError: Corpus x does not exist.")

    with pytest.raises(KeyboardInterrupt), write_run_info(out, "train", Small()):
        raise KeyboardInterrupt
    assert storage.read_json(f"{out}/run.json")["status"] == "interrupted"


@dataclass
class Result:
    path: Path
    loss: float
    rows: list[dict[str, object]]


def test_json_is_json_whatever_the_result_holds(capfd: pytest.CaptureFixture[str]) -> None:
    with console.stdout_kept_for_json():
        print("a library's chatter")
    console.print_json(Result(Path("a/b"), math.nan, [{"value": np.float32(0.5), "ids": (1, 2)}]))
    out, err = capfd.readouterr()
    assert json.loads(out) == {"path": "a/b", "loss": None, "rows": [{"value": 0.5, "ids": [1, 2]}]}
    assert "chatter" in err


def test_a_result_becomes_tables(capfd: pytest.CaptureFixture[str]) -> None:
    console.print_result("clew x", Result(Path("a/b"), 0.123456, [{"metric": "R@1", "value": 0.5, "deep": [[1]]}]))
    out = capfd.readouterr().out
    for part in ("clew x", "loss", "0.1235", "metric", "R@1"):
        assert part in out
    assert "deep" not in out
