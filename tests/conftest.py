"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

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


# What starts Ray, and what shares the pool of gloo processes.
RAY = ("tests/chaos/", "tests/end_to_end/", "tests/unit/test_loader.py", "tests/unit/test_text_stages.py")
POOL = "tests/distributed/"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under pytest-xdist, what starts Ray shares one worker process, and what shares the gloo pool another.

    Two Rays at a time would starve each other; one pool serves all its tests. (Marks of the group do nothing under
    pytest 9.2, whose node ids pytest-xdist 3.8 cannot change.)
    """
    from xdist.scheduler.loadscope import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(RAY):
                return "ray"
            return "pool" if nodeid.startswith(POOL) else nodeid

    return Groups(config, log)
