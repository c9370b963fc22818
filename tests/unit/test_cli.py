"""The command line itself: help, refusals, exit codes. What the commands do is tested where it is built."""

from __future__ import annotations

import errno
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import yaml

from cl import cli
from cl.errors import DataError
from cl.objectives import OBJECTIVES
from cl.objectives.table import markdown, parameter_rows

LISTS = ("objectives", "recipes", "augmentations", "arrangements", "stages", "metrics")
RUNS = ("ingest", "curate", "train", "eval", "sweep", "embed")


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `clew WORDS...` in this process."""
    code = 0
    try:
        cli.main(list(words))
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code, out, err = call(capsys, *words)
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"clew: [^\n]+\n", err), err
    return err


def test_every_command_shows_an_example_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(cli.cli.commands) >= {*LISTS, *RUNS, "report", "demo", "doctor"}
    for name in cli.cli.commands:
        code, out, err = call(capsys, name, "--help")
        assert (code, err) == (0, "")
        assert re.search(rf"Example:\n +clew {name}\b", out), out


@pytest.mark.parametrize("name", RUNS)
def test_the_examples_are_configs_that_load(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    epilog = cli.cli.commands[name].epilog or ""
    lines = re.findall(rf"^ *clew {name} (.*)$", epilog, re.MULTILINE)
    assert lines
    for line in lines:
        code, out, err = call(capsys, name, *shlex.split(line.replace("*", "0")), "--print-config")
        assert (code, err) == (0, ""), line
        assert yaml.safe_load(out)["out"].startswith("runs/")


def test_help_imports_nothing_heavy_and_comes_at_once() -> None:
    code = (
        "import sys, cl.cli\n"
        "try: cl.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'pyarrow', 'numpy', 'pandas', 'transformers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(cli.__file__).parents[1])
    assert time.monotonic() - started < 5  # about 0.15 s where nothing else runs


def test_a_wrong_command_or_option_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean 'curate'?" in refused(capsys, "cruate")
    assert "Did you mean '--json'" in refused(capsys, "metrics", "--jsn")
    assert "--out" in refused(capsys, "report", "runs/x")


@pytest.mark.parametrize("name", RUNS)
def test_a_missing_config_is_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"clew {name} needs" in refused(capsys, name)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "ingest"])
def test_a_config_that_does_not_exist_is_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere/x.yaml does not exist" in refused(capsys, name, "nowhere/x.yaml")
    assert "takes one config" in refused(capsys, name, "one", "two")


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_json_rows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, name, "--json")
    rows = json.loads(out)
    assert code == 0
    assert rows
    assert [row["name"] for row in rows] == sorted({row["name"] for row in rows})
    for row in rows:
        assert row.keys() >= {"name", "summary", "paper"}
        assert row["summary"], row


def test_one_objective_shows_its_formula_and_the_range_of_each_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "objectives", "infonce")
    assert code == 0
    assert "logsumexp_j l_ij - l_ii" in out
    code, out, _ = call(capsys, "objectives", "infonce", "--json")
    rows = {row["parameter"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["max_scale"]["range"] == "> 0"
    assert rows["direction"]["type"] == "both | forward | backward"
    assert rows["tile_rows"] == {
        "parameter": "tile_rows",
        "type": "int",
        "default": "0",
        "range": ">= 0",
        "meaning": "anchors a tile; 0: by device",
    }
    assert "Did you mean 'infonce'" in refused(capsys, "objectives", "infonc")


def test_every_parameter_of_every_objective_says_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    for name in [entry.name for entry in OBJECTIVES.entries()]:
        for row in parameter_rows(name):
            assert row["meaning"], (name, row["parameter"])


def test_the_documented_table_of_objectives_is_that_of_the_registry() -> None:
    """`clew objectives --markdown` made it; make it anew when an objective changes."""
    documented = (Path(__file__).resolve().parents[2] / "cl" / "objectives" / "README.md").read_text()
    assert documented.endswith(markdown())


def test_errors_end_with_their_exit_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: BaseException) -> click.Command:
        def fail() -> None:
            raise error

        return click.Command("fail", callback=fail)

    wrapped = RuntimeError("task failed")
    wrapped.__cause__ = DataError("Corpus x\nhas no samples.")
    full = RuntimeError("task failed")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    expected: list[tuple[BaseException, int, str]] = [
        (DataError("Corpus x does not exist."), 2, "clew: Corpus x does not exist.\n"),
        (wrapped, 2, "clew: Corpus x has no samples.\n"),
        (full, 2, "clew: No space is left on the disk of /data/x.\n"),
        (KeyboardInterrupt(), 130, "clew: interrupted. To go on from where it stopped: clew fail\n"),
    ]
    for error, code, message in expected:
        monkeypatch.setitem(cli.cli.commands, "fail", failing(error))
        assert call(capsys, "fail") == (code, "", message if code != 130 else "\n" + message)
    monkeypatch.setitem(cli.cli.commands, "fail", failing(ValueError("a defect of ours")))
    with pytest.raises(ValueError, match="a defect of ours"):
        cli.main(["fail"])
