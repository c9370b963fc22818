"""How fast a config's data arrive when no model waits for them: `clew bench data`."""

from __future__ import annotations

import contextlib
import time
import typing
from collections.abc import Generator, Sequence

from pydantic import BaseModel
from torch import Tensor

from cl.batches.batch import Batch
from cl.errors import ConfigError
from cl.training.config import TrainConfig
from cl.training.data import TrainingData


class Throughput(BaseModel):
    """One worker's loader with a number of threads.

    `first_batch_seconds` (files opened, nothing read ahead) is not part of the rates.
    """

    threads: int
    samples_per_second: float
    tokens_per_second: float | None  # real ones, of all text views; None without any
    batch_ms: float
    first_batch_seconds: float
    undecodable: int  # samples whose pictures could not be decoded


def measure_data(cfg: TrainConfig, threads: Sequence[int], steps: int, workers: int = 1) -> list[Throughput]:
    """Read batches as the first of some workers would, and time them.

    Each number of threads reads other batches of the epoch, so that none finds what the one before has read.

    Args:
        threads: numbers of decoding threads to try.
        steps: batches that are timed, at each number.
        workers: how many share a global batch.

    Raises:
        ConfigError: no threads or steps, or more workers than samples in a batch.
    """
    if not threads or min(threads) < 1 or steps < 1 or not 1 <= workers <= cfg.batch_size:
        raise ConfigError(
            f"clew bench data takes threads and steps from 1, and 1 to {cfg.batch_size} workers (the batch size), not "
            f"threads {list(threads)}, steps {steps} and workers {workers}."
        )
    data = TrainingData.of(cfg)
    return [_measure(data, count, steps, workers, number * (steps + 1)) for number, count in enumerate(threads)]


def _measure(data: TrainingData, threads: int, steps: int, workers: int, done: int) -> Throughput:
    loader = data.loader(0, workers, done, steps + 1, threads)
    texts = {view: data.inputs.text(view) for view in data.inputs.views if data.inputs.modality(view) == "text"}
    samples, tokens = 0, 0
    begun = time.perf_counter()
    with contextlib.closing(typing.cast("Generator[Batch]", iter(loader))) as batches:
        next(batches)
        first = time.perf_counter()
        for batch in batches:
            samples += len(batch.ids)
            tokens += sum(_tokens(batch.views[view], text.tokenizer.pad_id) for view, text in texts.items())
    seconds = time.perf_counter() - first
    return Throughput(
        threads=threads,
        samples_per_second=round(samples / seconds, 1),
        tokens_per_second=round(tokens / seconds, 1) if texts else None,
        batch_ms=round(1000 * seconds / steps, 2),
        first_batch_seconds=round(first - begun, 3),
        undecodable=loader.quarantined,
    )


def _tokens(view: Tensor | dict[str, Tensor], padding: int) -> int:
    """Tokens of a view that are no padding."""
    return int(view["attention_mask"].sum() if isinstance(view, dict) else (view != padding).sum())
