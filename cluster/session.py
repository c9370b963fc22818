"""The one place where Clew starts Ray or attaches to it.

    with ray_session() as session:
        ...

- Ray already initialised in this process (a notebook, a test, the user's own program): used as it is and left running.
- An `address`, or `RAY_ADDRESS` in the environment: attached to, and only disconnected from at the end.
- Otherwise a local cluster that listens on the loopback interface alone, asks every caller for a token made for this
  process, reports nothing to anybody, and is gone when the block ends, whether by success, error, Ctrl-C or SIGTERM.

Workers import the same `cl`, `pipelines` and `cluster` as the driver: from the environment they share, or from the
checkout the driver runs from.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from cl.errors import ConfigError

# Where the packages are imported from: the checkout, or the environment's site-packages.
ROOT = Path(__file__).resolve().parent.parent

# What Ray and its processes read, unless the user has set it.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # send nothing home
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave CUDA_VISIBLE_DEVICES alone in tasks without GPUs
}


@dataclass(frozen=True)
class Session:
    """The Ray that a block runs on."""

    address: str  # GCS address, host:port
    cpus: float
    gpus: float
    nodes: int
    started: bool  # by us, and so stopped by us
    dashboard: str | None  # URL, or None if it is off


@contextlib.contextmanager
def ray_session(
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    object_store_memory: int | None = None,
    resources: Mapping[str, float] | None = None,
    dashboard: bool = False,
    address: str | None = None,
    log_to_driver: bool = False,
) -> Iterator[Session]:
    """Run a block on Ray; see the module's text for which one.

    Args:
        num_cpus: logical CPUs of a local cluster; None: the cores of this machine.
        num_gpus: GPUs of a local cluster; None: those that are there.
        object_store_memory: bytes of a local cluster's object store; None: Ray's choice.
        resources: custom resources of a local cluster, such as Tune's trial slots.
        dashboard: start the dashboard (on loopback): Ray Tune releases a stopped trial's resources through it.
        address: a running cluster ("auto", host:port or ray://...); None: `RAY_ADDRESS`, else a local cluster.
        log_to_driver: repeat what workers print.

    Raises:
        ConfigError: the cluster at the address cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield _describe(started=False)
        return
    common: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR, "configure_logging": True}
    with _terminable():
        try:
            if address is None:
                _protect_local()
                with _loopback_only():
                    ray.init(
                        address="local",
                        num_cpus=num_cpus,
                        num_gpus=num_gpus,
                        object_store_memory=object_store_memory,
                        resources=dict(resources) if resources else None,
                        include_dashboard=dashboard,
                        **common,
                    )
            else:
                _knock(address)
                runtime_env = {"env_vars": {"PYTHONPATH": _python_path()}} if _from_checkout() else None
                try:
                    ray.init(address=address, runtime_env=runtime_env, **common)
                except (ConnectionError, ray.exceptions.RaySystemError, ray.exceptions.AuthenticationError) as error:
                    first_line = str(error).strip().splitlines()[0]
                    raise ConfigError(f"No Ray cluster answers at {address} (RAY_ADDRESS): {first_line}") from error
            with _terminable():  # again: ray.init has put its own handler in place
                yield _describe(started=address is None)
        finally:
            with _undisturbed():
                processes = _local_processes() if address is None else []
                ray.shutdown()
                _await_end(processes)


def _knock(address: str, seconds: float = 10.0) -> None:
    """Refuse an address at which nothing listens: Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto", a namespace, or a scheme of another provider: Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"No Ray cluster answers at {address} (RAY_ADDRESS): {reason}.") from error


def _local_processes() -> list[psutil.Process]:
    """The processes of the local cluster that this process started."""
    from ray._private import worker

    if worker._global_node is None:
        return []
    session = worker._global_node.get_session_dir_path()
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any(session in word for word in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _await_end(processes: list[psutil.Process], seconds: float = 5.0) -> None:
    """Wait until processes that were told to end have ended, and kill those that have not."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _protect_local() -> None:
    """Token authentication with a token of this process alone, and workers that import what the driver imports."""
    if "RAY_AUTH_MODE" not in os.environ:
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        os.environ["RAY_AUTH_MODE"] = "token"
        # Left to itself, Ray would write a lasting token under the home directory.
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        # Ray read both when it was imported, which may have been before this call.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
    if _from_checkout():
        os.environ["PYTHONPATH"] = _python_path()


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Let the node that is being started take 127.0.0.1 as its address, so that no port is open to the network.

    Ray replaces a loopback address by that of a network card unless this switch (its way on Windows and macOS) is off.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _from_checkout() -> bool:
    return (ROOT / "pyproject.toml").is_file()


def _python_path() -> str:
    """PYTHONPATH with the checkout in front."""
    parts = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(ROOT)]
    return os.pathsep.join([str(ROOT), *parts])


def _describe(started: bool) -> Session:
    import ray

    context = ray.get_runtime_context()
    resources = ray.cluster_resources()
    return Session(
        address=context.gcs_address,
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        nodes=sum(1 for node in ray.nodes() if node["Alive"]),
        started=started,
        dashboard=dashboard_url(),
    )


def dashboard_url() -> str | None:
    """The URL of the connected cluster's dashboard, or None if it is off."""
    from ray._private.worker import get_dashboard_url

    url = get_dashboard_url()
    return f"http://{url}" if url else None


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into SystemExit for the block, so that what it started is shut down."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signal handlers belong to the main thread
        return

    def stop(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore a second Ctrl-C or SIGTERM while Ray is being shut down: an aborted shutdown leaves processes behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
