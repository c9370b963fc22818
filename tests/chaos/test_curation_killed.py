"""Drivers, workers and node processes die at random during curations: the bytes are those of a quiet run.

CLEW_KILLS says how many (12; `make chaos` takes 100). A stage of the test's own counts the rows that are processed
again: at most kills x tasks in flight x rows a shard.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.curation_runs import STAGES, launch, make_place, tree
from tests.end_to_end.clew import PATIENCE
from tests.end_to_end.test_plugins import install

KILLS = int(os.environ.get("CLEW_KILLS", "12"))
CPUS, FRAGMENTS, ROWS = 2, 8, 20
MODULE = '''
from cl.config import Config
from pipelines.stages.base import Output, RowStage


class Tally(RowStage):
    """Note each fragment that is processed."""

    file: str

    def needs(self, kind):
        return ["text"]

    def run(self, rows):
        with open(self.file, "a") as file:
            file.write(f"{rows.fragment}\\n")
        return Output()
'''
ENTRY_POINTS = "[clew.stages]\ntally = extra_things:Tally\n"


def victims(driver: subprocess.Popen[bytes], kind: str) -> list[psutil.Process]:
    """Live processes of a kind below the driver: workers at work, or the node's own."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if kind == "worker" and title.startswith("ray::") and "IDLE" not in title and "Agent" not in title:
            found.append(process)
        if kind == "node" and process.name() == "raylet":
            found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.timeout(1200 + 60 * KILLS)
def test_a_curation_survives_kills_of_everything(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    site = [str(install(tmp_path / "site", ENTRY_POINTS, MODULE))]
    log = tmp_path / "tally"
    stages = [*STAGES, {"tally": {"file": str(log)}}]

    def start(out: str) -> subprocess.Popen[bytes]:
        return launch(place, out, CPUS, site=site, stages=stages)

    quiet = start("quiet")
    assert quiet.wait(timeout=PATIENCE) == 0, quiet.stderr and quiet.stderr.read().decode()[-2000:]
    expected = tree(place / "quiet")
    assert sorted(log.read_text().split()) == [str(n) for n in range(FRAGMENTS)]

    rng = random.Random(5)
    killed: Counter[str] = Counter()
    while killed.total() < KILLS:
        log.write_text("")
        shutil.rmtree(place / "out", ignore_errors=True)
        kills = 0  # of this curation
        driver = start("out")
        while True:
            try:
                driver.wait(timeout=rng.uniform(0.2, 2))
            except subprocess.TimeoutExpired:
                if killed.total() == KILLS or not (workers := victims(driver, "worker")):
                    continue
                kind = rng.choices(["worker", "driver", "node"], [6, 2, 1])[0]
                nodes = victims(driver, "node") if kind == "node" else []
                targets: dict[str, Sequence[subprocess.Popen[bytes] | psutil.Process]] = {
                    "worker": [rng.choice(workers)],
                    "driver": [driver],
                    "node": nodes[:1],
                }
                for victim in targets[kind]:
                    victim.send_signal(signal.SIGKILL)
                    killed[kind] += 1
                    kills += 1
                continue
            if driver.returncode == 0:
                break
            assert kills, driver.stderr and driver.stderr.read().decode()[-2000:]
            driver = start("out")
        assert tree(place / "out") == expected
        assert not list((place / "out").rglob(".tmp-*"))
        again = len(log.read_text().split()) - FRAGMENTS
        assert 0 <= again * ROWS <= kills * CPUS * ROWS
    assert killed["worker"] > 0

    before = log.read_text()
    assert start("out").wait(timeout=PATIENCE) == 0
    assert log.read_text() == before  # a finished curation does no work again
