"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Two cores are shared by everything a test starts; no test may reach for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CLEW_QUIET", "1")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with two CPUs that all tests of the session share."""
    from cluster.session import ray_session as start

    with start(num_cpus=2):
        yield


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under pytest-xdist, what starts Ray shares one worker process, and what shares the gloo pool another.

    Two Rays at a time would starve each other; one pool serves all tests of its group.
    """
    for item in items:
        folders = set(item.path.parts)
        if folders & {"end_to_end", "chaos"} or "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif "distributed" in folders:
            item.add_marker(pytest.mark.xdist_group("pool"))
