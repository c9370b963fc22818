"""Places that a config names."""

from __future__ import annotations

import os


def absolute(path: str) -> str:
    """A local path from the root, because workers may run in another folder; URLs as they are."""
    return path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))
