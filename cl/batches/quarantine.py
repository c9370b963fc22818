"""The samples of a run that could not be used, each written down once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson


class Quarantine:
    """A JSON-lines file of samples that could not be decoded; safe to share between threads.

    Args:
        path: local file; None only counts.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.count = 0
        self._known: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def add(
        self, sample_id: np.ndarray, epoch: int, step: int, reason: str, key: Callable[[], tuple[str, str]]
    ) -> None:
        """Count a sample and write it down, the first time that it comes.

        Args:
            sample_id: int64 [2].
            epoch, step: where it was met.
            reason: why it cannot be used.
            key: gives its shard and key.
        """
        name = (int(sample_id[0]), int(sample_id[1]))
        with self._lock:
            if name in self._known:
                return
            self._known.add(name)
            self.count += 1
            if self.path is None:
                return
            shard, sample_key = key()
            line = {
                "shard": shard,
                "key": sample_key,
                "stage": "decode",
                "reason": "unreadable_image",
                "detail": reason,
                "id": sample_id.astype(">i8").tobytes().hex(),
                "epoch": epoch,
                "step": step,
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(orjson.dumps(line) + b"\n")
