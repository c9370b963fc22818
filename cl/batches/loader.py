"""One worker's batches, read and decoded ahead of the training loop.

Threads do the work: libjpeg, PIL and the tokenizers release the interpreter's lock, so they scale like processes,
share the caches and start at once. Rows are handled in blocks, so that a large batch is spread over all threads.

A sample that cannot be decoded keeps its place with weight 0 and is written to the quarantine: nobody shifts, and
all workers run the same number of steps.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cl.batches.batch import Batch
from cl.batches.extra import ExtraTexts
from cl.batches.hashing import mix
from cl.batches.labels import Label
from cl.batches.quarantine import Quarantine
from cl.batches.reader import CorpusReader
from cl.batches.steps import Plan, StepSamples
from cl.batches.stored import StoredView
from cl.corpus import VIEWS
from cl.encoders.inputs import Inputs
from cl.errors import ConfigError
from cl.views.images import UnreadableImageError, load_views

_BLOCK = 32  # rows that one thread handles at a time
_AUGMENT, _BATCH = 3, 4  # what a hash is for


@dataclass
class _Pending:
    """A batch in the making."""

    samples: StepSamples
    images: dict[str, np.ndarray]
    texts: dict[str, list[str]]
    ids: np.ndarray
    content: np.ndarray
    weight: np.ndarray
    labels: dict[str, np.ndarray]
    extra: dict[str, list[list[str]]]
    stored: dict[str, np.ndarray]
    blocks: list[Future[None]]


class Loader:
    """Iterates over one worker's batches from a given step on.

    Args:
        plan: which samples each step holds.
        rank, world: this worker and how many there are.
        inputs: the model's inputs; its views must show fields of the corpus.
        start: (epoch, step) of the first batch.
        steps: number of batches, over any number of epochs; None never ends.
        workers: threads that decode.
        prefetch: batches made ahead.
        quarantine: local JSON-lines file that gets the samples that could not be decoded.
        cache_mib: memory for rows and remote images, MiB.
        pin_memory: put batches into page-locked memory (for copies to a GPU).
        labels: what else is wanted of each sample (`cl.batches.labels.open_labels`).
        extra: further texts of each sample (`cl.batches.extra.open_extra`).
        stored: embeddings of each sample that are on disk (`cl.batches.stored.open_stored`).
    """

    def __init__(
        self,
        plan: Plan,
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
        labels: Sequence[Label] = (),
        extra: Sequence[ExtraTexts] = (),
        stored: Sequence[StoredView] = (),
    ) -> None:
        if not 0 <= rank < world or workers < 1 or prefetch < 0:
            raise ConfigError(
                f"A loader cannot have rank {rank} of {world}, {workers} workers and prefetch {prefetch}."
            )
        check_views(plan, inputs)
        self.plan, self.rank, self.world, self.inputs = plan, rank, world, inputs
        self.start, self.steps, self.workers, self.prefetch = start, steps, workers, prefetch
        self.pin_memory, self.labels, self.extra = pin_memory, labels, extra
        self._fields = inputs.distinct_fields()
        self._draws = {view: inputs.draw_key(view) for view, spec in inputs.views.items() if spec.augmentation}
        self._quarantine = Quarantine(Path(quarantine) if quarantine is not None else None)
        lists = [each.config.column for each in extra]
        self.stored = stored
        self._reader = CorpusReader(plan, self._fields, cache_mib, labels, lists, stored)

    @property
    def quarantined(self) -> int:
        """Samples that could not be decoded, each counted once."""
        return self._quarantine.count

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
            np.zeros((rows, len(self._fields)), np.int64),
            np.zeros(rows, np.float32),
            {label.name: label.empty(rows) for label in self.labels},
            {each.name: [[] for _ in range(rows)] for each in self.extra},
            {each.name: each.empty(rows) for each in self.stored},
            [],
        )
        for first in range(0, len(samples), _BLOCK):
            made.blocks.append(pool.submit(self._fill, made, first, min(first + _BLOCK, len(samples))))
        return made

    def _fill(self, made: _Pending, first: int, last: int) -> None:
        """Read, decode and augment rows first..last of a batch."""
        samples = made.samples
        places = [(int(samples.chunk[at]), int(samples.row[at])) for at in range(first, last)]
        held = [self._reader.rows(chunk) for chunk, _ in places]
        for at, (_, row), rows in zip(range(first, last), places, held, strict=True):
            made.ids[at], made.content[at], made.weight[at] = rows.ids[row], rows.content[row], 1
            for name, label in made.labels.items():
                label[at] = rows.labels[name][row]
            for name, embeddings in made.stored.items():
                embeddings[at] = rows.stored[name][row]
            for each in self.extra:
                texts = rows.texts(each.config.column, row)
                made.extra[each.name][at] = each.choose(texts, self.plan.seed, int(samples.turn[at]), made.ids[at])
        draws = {
            view: mix(self.plan.seed, _AUGMENT, samples.turn[first:last], key, *made.ids[first:last].T)
            for view, key in self._draws.items()
        }
        shows = [
            (self.inputs.field_of(view), self.inputs.text(view), draws.get(view), shown)
            for view, shown in made.texts.items()
        ]
        specs = [(self.inputs.image(view), draws.get(view)) for view in made.images]
        for at, (chunk, row), rows in zip(range(first, last), places, held, strict=True):
            for field, text, seeds, shown in shows:
                shown[at] = text.augmented(rows.text(field, row), 0 if seeds is None else int(seeds[at - first]))
            if not specs:
                continue
            wanted = [image.wanted(0 if seeds is None else int(seeds[at - first])) for image, seeds in specs]
            try:
                pictures = load_views(self._reader.image(chunk, row), wanted)
            except UnreadableImageError as error:
                made.weight[at] = 0
                self._quarantine.add(
                    made.ids[at],
                    samples.epoch,
                    samples.step,
                    str(error),
                    functools.partial(self._reader.key, chunk, row),
                )
                continue
            for images, picture in zip(made.images.values(), pictures, strict=True):
                images[at] = picture.transpose(2, 0, 1)

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
            {name: torch.from_numpy(label) for name, label in made.labels.items()},
            {each.name: each.batch(made.extra[each.name], self.inputs, self._fields) for each in self.extra},
            {name: torch.from_numpy(embeddings) for name, embeddings in made.stored.items()},
        )
        return batch.pinned() if self.pin_memory else batch


def check_views(plan: Plan, inputs: Inputs) -> None:
    """Refuse a model whose views do not show fields of the corpus.

    Raises:
        ConfigError: a field that the corpus lacks, or has in another modality.
    """
    has = VIEWS[plan.kind]
    for view in inputs.views:
        field = inputs.field_of(view)
        if has.get(field) != inputs.modality(view):
            fields = ", ".join(f"{name} ({kind})" for name, kind in has.items())
            shown = "" if field == view else f" of {field!r}"
            raise ConfigError(
                f"The model reads the view {view!r}{shown} ({inputs.modality(view)}), but {plan.corpora[0].root} is a "
                f"{plan.kind} corpus with the views {fields}."
            )
