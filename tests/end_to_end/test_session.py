"""The Ray session: reachable from this machine alone, and nothing of it left behind however it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.clew import PATIENCE, clew, environment, sentence

PROGRAM = """
import json, os, sys, time, psutil
from cluster.session import ray_session
with ray_session(num_cpus=1) as session:
    import ray
    @ray.remote
    def where():
        import cl, cluster
        return cl.__file__
    children = psutil.Process().children(recursive=True)
    ports = []
    for process in [psutil.Process(), *children]:
        try:
            ports += [c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"]
        except psutil.Error:
            pass
    print(json.dumps({
        "cl": ray.get(where.remote()), "here": __import__("cl").__file__, "ports": ports, "started": session.started,
        "children": [c.pid for c in children], "token": os.environ["RAY_AUTH_TOKEN"],
    }), flush=True)
    time.sleep(float(sys.argv[1]))
    ray.get(where.remote())
"""


def start(folder: Path, seconds: float) -> tuple[subprocess.Popen[str], dict]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(seconds)],
        cwd=folder,
        env=environment() | {"HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    return process, json.loads(line)


def alive(pids: list[int]) -> list[psutil.Process]:
    found = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_local_cluster_is_private_and_ends_with_its_block(tmp_path: Path) -> None:
    process, seen = start(tmp_path, 0)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert seen["started"]
    assert seen["cl"] == seen["here"]  # workers import the driver's packages
    assert seen["ports"]
    assert set(seen["ports"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert seen["children"]
    assert alive(seen["children"]) == []
    assert len(seen["token"]) == 64
    assert not (tmp_path / ".ray").exists()  # no lasting token under the home directory
    assert (out, err) == ("", "")  # and nothing said that nobody asked for


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_process_behind(number: signal.Signals, code: int, tmp_path: Path) -> None:
    process, seen = start(tmp_path, 60)
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    # Python answers an unhandled KeyboardInterrupt by killing itself with SIGINT.
    assert process.returncode in ({-signal.SIGINT, 130, code} if number == signal.SIGINT else {code})
    assert alive(seen["children"]) == []


@pytest.mark.slow
def test_a_killed_driver_takes_its_cluster_along(tmp_path: Path) -> None:
    process, seen = start(tmp_path, 60)
    process.kill()
    process.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE  # Ray's agents notice after half a minute
    while alive(seen["children"]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(seen["children"]) == []


@pytest.mark.usefixtures("ray_session")
def test_a_running_ray_is_used_and_left_running() -> None:
    import ray

    from cluster.session import ray_session

    with ray_session(num_cpus=7) as session:
        assert not session.started
        assert session.cpus == 2
    assert ray.is_initialized()


@pytest.mark.slow
def test_doctor_answers_in_json_and_its_exit_code_says_whether_something_fails(tmp_path: Path) -> None:
    done = clew("doctor", "--json", cwd=tmp_path)
    rows = {row["check"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert rows["ray"]["found"].startswith("2.60")
    assert {"python", "torch", "open_clip_torch", "cores", "memory", "gpus", "storage", "free disk"} <= rows.keys()
    assert not (tmp_path / "runs").exists()  # looking changes nothing

    (tmp_path / "file").write_text("")
    done = clew("doctor", "--json", "--storage", "file/runs", cwd=tmp_path)
    rows = {row["check"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 1
    assert rows["storage"]["status"] == "fail"
    assert rows["storage"]["mend"]


@pytest.mark.slow
def test_doctor_looks_at_every_node(tmp_path: Path) -> None:
    done = clew("doctor", "--json", "--cluster", cwd=tmp_path)
    nodes = [row for row in json.loads(done.stdout) if row["check"].startswith("node ")]
    assert [row["status"] for row in nodes] == ["ok"]


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_is_one_sentence(tmp_path: Path) -> None:
    code = "from cluster.session import ray_session\nfrom cl.cli import cli, main\nimport click\n"
    code += "@cli.command()\ndef attach():\n    with ray_session(): pass\nmain(['attach'])\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(RAY_ADDRESS="127.0.0.1:1"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert "127.0.0.1:1" in sentence(done)
