"""Times a run: seconds since its start, and speed and waiting between two records."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Starts when it is made.

    Args:
        seconds: of training before an interruption.
        samples: positions of the corpora consumed before it.
    """

    def __init__(self, seconds: float, samples: int) -> None:
        self._before, self._start = seconds, time.perf_counter()
        self._lap, self._samples, self._waited = self._start, samples, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a block as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def seconds(self) -> float:
        """Seconds of training, those of the interrupted part of the run included."""
        return self._before + time.perf_counter() - self._start

    def lap(self, samples: int) -> dict[str, float]:
        """Numbers of the time since the last lap, and a new lap."""
        now = time.perf_counter()
        spent = max(now - self._lap, 1e-9)
        numbers = {
            "samples_per_second": (samples - self._samples) / spent,
            "data_wait": min(self._waited / spent, 1.0),
            "seconds": self.seconds(),
        }
        self._lap, self._samples, self._waited = now, samples, 0.0
        return numbers
