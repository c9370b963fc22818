"""`clew doctor`: what this machine or cluster has, and what would fail on it.

Each check answers with one row: what was found, what would go wrong because of it, and how to mend that. Nothing here
changes the machine: the probe of the storage deletes its own file.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil

import cl
from cl import storage
from cl.config import configs_dir
from cl.errors import ClewError
from cluster.session import ray_session

GIB = 1024**3
PINNED = ("ray", "torch", "torchvision", "open_clip_torch", "transformers", "pyarrow", "numpy", "polars", "faiss-cpu")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Check:
    """One row of the doctor's answer."""

    check: str
    status: Literal["ok", "warn", "fail"]
    found: str
    problem: str = ""  # what would fail or be slow
    mend: str = ""


def examine(storage_url: str = "runs", cluster: bool = False) -> list[Check]:
    """Run all checks.

    Args:
        storage_url: the folder or URL that runs write to.
        cluster: also start Ray, or attach to the one at RAY_ADDRESS, and look at every node.
    """
    rows = [
        _python(),
        *_versions(),
        _torch_pair(),
        _cores(),
        _memory(),
        _gpus(),
        *_storage(storage_url),
        _temporary_disk(),
        _shared_memory(),
        _open_files(),
        _ports(),
        _browser(),
    ]
    return rows + (_cluster(storage_url) if cluster else [])


def pins() -> dict[str, str]:
    """Package -> tested version, from the shipped constraints."""
    lines = (configs_dir() / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))


def installed(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable}), Clew {cl.__version__}"
    if (3, 11) <= sys.version_info < (3, 14):
        return Check("python", "ok", found)
    return Check("python", "fail", found, "Clew needs Python 3.11 to 3.13.", "Make the environment with one of these.")


def _versions() -> Iterator[Check]:
    tested = pins()
    for name in PINNED:
        here, pin = installed(name), tested.get(name)
        if here is None:
            yield Check(name, "fail", "not installed", f"{name} is needed.", f"pip install {name}=={pin}")
        elif pin is not None and here != pin:
            yield Check(name, "warn", here, f"Clew is tested with {pin}.", f"pip install {name}=={pin}")
        else:
            yield Check(name, "ok", here)


def _torch_pair() -> Check:
    try:
        import torch
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)  # its compiled part belongs to one torch
    except Exception as error:
        mend = f"pip install torch=={pins()['torch']} torchvision=={pins()['torchvision']}"
        return Check("torch imports", "fail", str(error)[:120], "Training and image embedding would fail.", mend)
    return Check("torch imports", "ok", f"with torchvision, {torch.get_num_threads()} threads")


def _cores() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if count < 2:
        return Check("cores", "warn", str(count), "Workers and data loading share one core.", "Use at least 2 cores.")
    return Check("cores", "ok", str(count))


def _memory() -> Check:
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    with contextlib.suppress(OSError, ValueError):  # a container's limit, where there is one ("max" is none)
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        total, free = min(total, limit), min(free, limit)
    found = f"{free / GIB:.1f} GiB of {total / GIB:.1f} free"
    if free < 4 * GIB:
        return Check(
            "memory", "warn", found, "Ray kills workers when memory runs out.", "Close programs, or fewer workers."
        )
    return Check("memory", "ok", found)


def _gpus() -> Check:
    try:
        import torch

        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except Exception as error:
        return Check("gpus", "warn", str(error)[:120], "Training runs on CPUs.", "Check the driver with nvidia-smi.")
    if names:
        return Check("gpus", "ok", ", ".join(names))
    if os.path.exists("/dev/nvidiactl"):
        return Check(
            "gpus", "warn", "a driver, but none that torch can use", "Training runs on CPUs.", "Update the driver."
        )
    return Check("gpus", "ok", "none: training runs on CPUs")


def _storage(url: str) -> Iterator[Check]:
    probe = storage.join(url, f".doctor-{uuid.uuid4().hex[:8]}")
    made = storage.is_local(url) and not storage.exists(url)
    try:
        storage.write_bytes(probe, b"clew")
        fs, path = storage.open_fs(probe)
        intact = fs.cat_file(path) == b"clew"
        fs.rm_file(path)
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(storage.open_fs(url)[1])
        if not intact:
            raise OSError("what was written does not read back")
    except Exception as error:  # whatever a file system's client raises is the finding
        yield Check(
            "storage", "fail", f"{url}: {error}"[:160], "No run could write its results.", "Mend the path or rights."
        )
        return
    yield Check("storage", "ok", f"{url} is writable")
    if storage.is_local(url):
        yield _disk("free disk", storage.open_fs(url)[1], "A run would end with a full disk.")


def _temporary_disk() -> Check:
    return _disk("temporary disk", os.environ.get("RAY_TMPDIR", "/tmp"), "Ray keeps logs and spilled objects there.")  # noqa: S108


def _disk(name: str, path: str, problem: str) -> Check:
    while not os.path.exists(path):
        path = os.path.dirname(path) or "."
    usage = shutil.disk_usage(path)
    found = f"{usage.free / GIB:.1f} GiB of {usage.total / GIB:.1f} at {os.path.abspath(path)}"
    mend = "Free some space, or use another disk."
    if usage.free < 1 * GIB:
        return Check(name, "fail", found, problem, mend)
    if usage.free < 5 * GIB:
        return Check(name, "warn", found, problem, mend)
    return Check(name, "ok", found)


def _shared_memory() -> Check:
    if not os.path.isdir("/dev/shm"):  # noqa: S108
        return Check("shared memory", "ok", "none: Ray's object store is on disk")
    size = shutil.disk_usage("/dev/shm").total  # noqa: S108
    found = f"{size / GIB:.1f} GiB at /dev/shm"
    if size < 1 * GIB:
        return Check(
            "shared memory", "warn", found, "Ray's object store falls back to disk.", "docker run --shm-size=4g"
        )
    return Check("shared memory", "ok", found)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        return Check(
            "open files", "warn", f"limit {soft}", "Ray opens many sockets and files.", f"ulimit -n {min(hard, 65536)}"
        )
    return Check("open files", "ok", f"limit {soft}")


def _ports() -> Check:
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen()
            client.settimeout(2)
            client.connect(server.getsockname())
    except OSError as error:
        return Check(
            "loopback ports", "fail", str(error), "Ray's processes could not talk.", "Allow connections on 127.0.0.1."
        )
    return Check("loopback ports", "ok", "can be opened and reached")


def _browser() -> Check:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found:
        return Check("browser", "ok", found)
    return Check(
        "browser", "warn", "no chromium", "Only the test that looks at the report.", "apt-get install chromium"
    )


def _look(probe: str | None) -> dict[str, Any]:
    """What one node has; runs there."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "clew": cl.__version__,
        **{name: installed(name) for name in PINNED},
        "storage": storage.exists(probe) if probe else None,
    }


def _cluster(storage_url: str) -> list[Check]:
    """One row on the cluster and one a node."""
    try:
        with ray_session() as session:
            nodes = "1 node" if session.nodes == 1 else f"{session.nodes} nodes"
            found = f"{nodes}, {session.cpus:g} CPUs, {session.gpus:g} GPUs at {session.address}"
            rows = [Check("ray", "ok", ("a local one, for this check: " if session.started else "") + found)]
            return rows + _nodes(storage_url, probe_storage=session.nodes > 1)
    except ClewError as error:
        return [
            Check("ray", "fail", str(error), "Nothing could run.", "Check RAY_ADDRESS and the cluster's head node.")
        ]


def _nodes(storage_url: str, probe_storage: bool) -> list[Check]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look: Callable[..., Any] = ray.remote(num_cpus=0)(_look).options
    here = _look(None)
    probe = storage.join(storage_url, f".doctor-{uuid.uuid4().hex[:8]}") if probe_storage else None
    if probe:
        probe = os.path.abspath(probe) if storage.is_local(probe) else probe
        storage.write_bytes(probe, b"clew")
    rows = []
    try:
        for node in (node for node in ray.nodes() if node["Alive"]):
            name = f"node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                there = ray.get(look(scheduling_strategy=strategy).remote(probe), timeout=120)
            except Exception as error:
                first_line = str(error).strip().splitlines()[0][:160]
                rows.append(Check(name, "fail", first_line, "Nothing runs there.", "Install the same Clew on it."))
                continue
            rows.append(_compare(name, here, there, storage_url))
    finally:
        if probe:
            fs, path = storage.open_fs(probe)
            fs.rm_file(path)
    return rows


def _compare(name: str, here: dict[str, Any], there: dict[str, Any], storage_url: str) -> Check:
    others = [f"{key} {there[key]} (here {here[key]})" for key in here if key != "storage" and there[key] != here[key]]
    if there["storage"] is False:
        mend = "Use an object store, or mount the same folder everywhere."
        return Check(name, "fail", f"{storage_url} is not shared", "Runs could not find each other's files.", mend)
    if others:
        return Check(
            name, "fail", ", ".join(others), "Nodes must have the same versions.", "Use one image or constraints."
        )
    return Check(name, "ok", "the same versions" + (", storage shared" if there["storage"] else ""))
