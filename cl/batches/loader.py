"""One worker's batches, read and decoded ahead of the training loop.

Threads do the work: libjpeg, PIL and the tokenizers release the interpreter's lock, so they scale like processes,
share the caches and start at once. Rows are handled in blocks, so that a large batch is spread over all threads.

A sample that cannot be decoded keeps its place with weight 0 and is written to the quarantine: nobody shifts, and
all workers run the same number of steps.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import orjson
import torch
from torch import Tensor

from cl.batches.hashing import mix
from cl.batches.plan import BatchPlan, StepSamples
from cl.batches.reader import CorpusReader
from cl.corpus import VIEWS
from cl.encoders.inputs import Inputs
from cl.errors import ConfigError
from cl.views.images import UnreadableImageError

_BLOCK = 32  # rows that one thread handles at a time
_AUGMENT, _BATCH = 3, 4  # what a hash is for


@dataclass(frozen=True)
class Batch:
    """One worker's part of a step.

    Attributes:
        views: what each tower reads: uint8 images [B, 3, H, W], token ids [B, L] or a dict of ids and mask.
        ids: 128-bit sample ids, int64 [B, 2]; 0 where padded.
        content: 64-bit content ids, int64 [B, views]; samples that agree in any view are not each other's negatives.
        weight: float32 [B]: 1, or 0 for padding and for samples that could not be decoded.
        epoch, step: the step's place; `step` counts within the epoch.
        key: integer of 63 bits fixed by (seed, epoch, step), the same on all workers, for the step's random choices.
    """

    views: dict[str, Tensor | dict[str, Tensor]]
    ids: Tensor
    content: Tensor
    weight: Tensor
    epoch: int
    step: int
    key: int

    def __len__(self) -> int:
        return len(self.weight)

    def rows(self, part: slice) -> Batch:
        """The same step's batch with some of its samples."""
        views: dict[str, Tensor | dict[str, Tensor]] = {
            name: {field: tensor[part] for field, tensor in view.items()} if isinstance(view, dict) else view[part]
            for name, view in self.views.items()
        }
        return replace(self, views=views, ids=self.ids[part], content=self.content[part], weight=self.weight[part])

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device; pinned memory is copied without waiting."""
        views: dict[str, Tensor | dict[str, Tensor]] = {}
        for name, view in self.views.items():
            if isinstance(view, dict):
                views[name] = {field: tensor.to(device, non_blocking=True) for field, tensor in view.items()}
            else:
                views[name] = view.to(device, non_blocking=True)
        return replace(
            self,
            views=views,
            ids=self.ids.to(device, non_blocking=True),
            content=self.content.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
        )


@dataclass
class _Pending:
    """A batch in the making."""

    samples: StepSamples
    images: dict[str, np.ndarray]
    texts: dict[str, list[str]]
    ids: np.ndarray
    content: np.ndarray
    weight: np.ndarray
    blocks: list[Future[None]]


class Loader:
    """Iterates over one worker's batches from a given step on.

    Args:
        plan: which samples each step holds.
        rank, world: this worker and how many there are.
        inputs: the model's inputs; its views must be views of the corpus.
        start: (epoch, step) of the first batch.
        steps: number of batches, over any number of epochs; None never ends.
        workers: threads that decode.
        prefetch: batches made ahead.
        quarantine: local JSON-lines file that gets the samples that could not be decoded.
        cache_mib: memory for rows and remote images, MiB.
        pin_memory: put batches into page-locked memory (for copies to a GPU).
    """

    def __init__(
        self,
        plan: BatchPlan,
        rank: int,
        world: int,
        inputs: Inputs,
        start: tuple[int, int] = (0, 0),
        steps: int | None = None,
        workers: int = 2,
        prefetch: int = 2,
        quarantine: str | Path | None = None,
        cache_mib: int = 1024,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world or workers < 1 or prefetch < 0:
            raise ConfigError(
                f"A loader cannot have rank {rank} of {world}, {workers} workers and prefetch {prefetch}."
            )
        check_views(plan, inputs)
        self.plan, self.rank, self.world, self.inputs = plan, rank, world, inputs
        self.start, self.steps, self.workers, self.prefetch = start, steps, workers, prefetch
        self.pin_memory = pin_memory
        self.quarantined = 0
        self._quarantine = Path(quarantine) if quarantine is not None else None
        self._known_bad: set[tuple[int, int]] = set()
        self._quarantine_lock = threading.Lock()
        self._reader = CorpusReader(plan, list(inputs.views), cache_mib)

    def __iter__(self) -> Iterator[Batch]:
        stop = threading.Event()
        made: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=1)
        producer = threading.Thread(target=self._produce, args=(made, stop), name="clew-loader", daemon=True)
        producer.start()
        try:
            while True:
                item = made.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            while producer.is_alive():
                try:
                    made.get(timeout=0.05)
                except queue.Empty:
                    producer.join(0.05)

    def _produce(self, made: queue.Queue[Batch | BaseException | None], stop: threading.Event) -> None:
        """Keep `prefetch` batches in the making and hand them over in order; ends with None or the error."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="clew-decode")
        pending: deque[_Pending] = deque()
        try:
            (epoch, step), left = self.start, self.steps
            while not stop.is_set() and (left is None or left > 0 or pending):
                if len(pending) <= self.prefetch and (left is None or left > 0):
                    pending.append(self._begin(pool, epoch, step))
                    epoch, step = self.plan.next(epoch, step)
                    left = None if left is None else left - 1
                else:
                    made.put(self._finish(pending.popleft()))
            made.put(None)
        except BaseException as error:
            made.put(error)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, epoch: int, step: int) -> _Pending:
        samples = self.plan.part(self.plan.step(epoch, step), self.rank, self.world)
        low, high = self.plan.part_bounds(self.rank, self.world)
        rows = high - low
        images, texts = {}, {}
        for view in self.inputs.views:
            if self.inputs.modality(view) == "image":
                size = self.inputs.image(view).size
                images[view] = np.zeros((rows, 3, size, size), dtype=np.uint8)
            else:
                texts[view] = [""] * rows
        made = _Pending(
            samples,
            images,
            texts,
            np.zeros((rows, 2), np.int64),
            np.zeros((rows, len(self.inputs.views)), np.int64),
            np.zeros(rows, np.float32),
            [],
        )
        for first in range(0, len(samples), _BLOCK):
            made.blocks.append(pool.submit(self._fill, made, first, min(first + _BLOCK, len(samples))))
        return made

    def _fill(self, made: _Pending, first: int, last: int) -> None:
        """Read and decode rows first..last of a batch."""
        samples = made.samples
        for at in range(first, last):
            chunk, row = int(samples.chunk[at]), int(samples.row[at])
            rows = self._reader.rows(chunk)
            made.ids[at], made.content[at], made.weight[at] = rows.ids[row], rows.content[row], 1
            for view, texts in made.texts.items():
                texts[at] = rows.text(view, row)
        if not made.images:
            return
        seeds = mix(self.plan.seed, _AUGMENT, samples.epoch, made.ids[first:last, 0], made.ids[first:last, 1])
        for view, images in made.images.items():
            spec = self.inputs.image(view)
            for at in range(first, last):
                chunk, row = int(samples.chunk[at]), int(samples.row[at])
                try:
                    spec.load(self._reader.image(chunk, row), int(seeds[at - first]), images[at])
                except UnreadableImageError as error:
                    made.weight[at] = 0
                    self._report(samples, at, made.ids[at], str(error))

    def _finish(self, made: _Pending) -> Batch:
        for block in made.blocks:
            block.result()
        views: dict[str, Tensor | dict[str, Tensor]] = {}
        for view in self.inputs.views:
            if view in made.images:
                views[view] = torch.from_numpy(made.images[view])
            else:
                views[view] = self.inputs.texts(view, made.texts[view])
        epoch, step = made.samples.epoch, made.samples.step
        batch = Batch(
            views,
            torch.from_numpy(made.ids),
            torch.from_numpy(made.content),
            torch.from_numpy(made.weight),
            epoch,
            step,
            int(mix(self.plan.seed, _BATCH, epoch, step)) >> 1,
        )
        return _pinned(batch) if self.pin_memory else batch

    def _report(self, samples: StepSamples, at: int, sample_id: np.ndarray, reason: str) -> None:
        """Count a sample that could not be used and write it down the first time."""
        name = (int(sample_id[0]), int(sample_id[1]))
        with self._quarantine_lock:
            if name in self._known_bad:
                return
            self._known_bad.add(name)
            self.quarantined += 1
            if self._quarantine is None:
                return
            shard, key = self._reader.key(int(samples.chunk[at]), int(samples.row[at]))
            line = {
                "shard": shard,
                "key": key,
                "stage": "decode",
                "reason": "unreadable_image",
                "detail": reason,
                "id": sample_id.astype(">i8").tobytes().hex(),
                "epoch": samples.epoch,
                "step": samples.step,
            }
            self._quarantine.parent.mkdir(parents=True, exist_ok=True)
            with open(self._quarantine, "ab") as file:
                file.write(orjson.dumps(line) + b"\n")


def check_views(plan: BatchPlan, inputs: Inputs) -> None:
    """Refuse a model whose views are not those of the corpus.

    Raises:
        ConfigError: a view that the corpus lacks, or has in another modality.
    """
    has = VIEWS[plan.kind]
    for view in inputs.views:
        if has.get(view) != inputs.modality(view):
            views = ", ".join(f"{name} ({kind})" for name, kind in has.items())
            raise ConfigError(
                f"The model reads the view {view!r} ({inputs.modality(view)}), but {plan.corpora[0].root} is a "
                f"{plan.kind} corpus with the views {views}."
            )


def _pinned(batch: Batch) -> Batch:
    views = {
        name: {k: v.pin_memory() for k, v in view.items()} if isinstance(view, dict) else view.pin_memory()
        for name, view in batch.views.items()
    }
    return replace(
        batch,
        views=views,
        ids=batch.ids.pin_memory(),
        content=batch.content.pin_memory(),
        weight=batch.weight.pin_memory(),
    )
