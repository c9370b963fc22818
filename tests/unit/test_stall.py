"""A step that takes too long is explained: who does not answer, who is busy where, who waits."""

from __future__ import annotations

import logging
import queue
import threading
import time
from pathlib import Path

import pytest

from cl import storage
from cl.training import stall
from cl.training.stall import StallWatch, whereabouts


def wait_for(text: str, caplog: pytest.LogCaptureFixture) -> str:
    end = time.monotonic() + 60
    while not (found := [record.getMessage() for record in caplog.records if text in record.getMessage()]):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found[0]


def worker(out: str, rank: int, world: int, goes_on: threading.Event) -> threading.Thread:
    """A worker that stays in its third step until it may go on."""

    def train() -> None:
        with StallWatch(out, rank, world, 0.2) as watch:
            watch.beat(3)
            goes_on.wait()
            watch.beat(4)

    thread = threading.Thread(target=train)
    thread.start()
    return thread


def test_who_is_busy_and_who_does_not_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stall, "GRACE", 1.0)
    caplog.set_level(logging.WARNING, logger="cl")
    goes_on = threading.Event()
    threads = [worker(str(tmp_path), rank, 4, goes_on) for rank in (1, 3)]
    storage.write_json(str(tmp_path / "workers" / "rank-2.json"), {"host": "gpu-7", "process": 12})
    said = wait_for("Step 3 has taken", caplog)
    goes_on.set()
    for thread in threads:
        thread.join()
    assert "worker 0 left no note; worker 2 (process 12 on gpu-7) does not answer; worker 1 (process " in said
    assert said.count("is in tests/unit/test_stall.py:") == said.count("(train)") == 2
    told = [record for record in caplog.records if "has taken" in record.getMessage()]
    assert len(told) == 1  # by one of them, once
    assert (tmp_path / "train.log").read_text().count("Step 3 has taken") == 1  # worker 0 was not there to log it


def test_steps_that_go_on_are_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with StallWatch(str(tmp_path), 0, 1, 0.4) as watch:
        for step in range(12):
            watch.beat(step)
            time.sleep(0.1)
    assert not caplog.records
    note = storage.read_json(str(tmp_path / "workers" / "rank-0.json"))
    assert sorted(note) == ["host", "process"]


def test_where_a_thread_is_that_waits_in_the_library() -> None:
    empty: queue.Queue[int] = queue.Queue()
    thread = threading.Thread(target=empty.get, daemon=True)
    thread.start()
    assert whereabouts(thread.ident or 0) == {"where": "no code of its own", "waits": False}
    empty.put(1)
    thread.join()
