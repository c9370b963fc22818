"""Which samples each step holds: a pure function of (corpora, seed, global batch, epoch, step).

A *chunk* is a row group of a fragment: samples that lie together on disk. Chunks belong to *lanes*. In an epoch,
each lane runs through a keyed permutation of its chunks; windows of `window` chunks are shuffled sample by sample;
and steps take from the lanes in proportion to their sizes (cl/batches/apportion.py). Hence

- the samples of a step do not depend on the number of workers, and any step is found without the ones before it:
  a run is resumed, on any number of workers, from (epoch, step) alone;
- an epoch holds every sample exactly once;
- memory is O(chunks), and only `window` chunks a lane are in use at a time.

Within a step, samples are in the order of their lanes, so that a worker's contiguous part of every step comes from
about the same lanes and hence from few chunks.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import orjson

from cl.batches.apportion import taken
from cl.batches.hashing import permutation
from cl.batches.steps import Chunk, Plan, StepSamples
from cl.corpus import Corpus
from cl.errors import ConfigError, DataError

RAW_LANES = 64  # lanes of a corpus that was not written for training: row group number mod this
_CHUNKS, _ROWS = 1, 2  # what a permutation is for


@dataclass(frozen=True)
class _EpochOrder:
    """The order of one epoch: for each lane its chunks, and the first sample number of each window."""

    chunks: list[np.ndarray]
    window_starts: list[np.ndarray]  # [windows + 1]


class BatchPlan(Plan):
    """The order of training over one or more corpora of the same kind.

    Args:
        corpora: what to train on; samples of all of them are mixed in proportion to their sizes.
        seed: fixes the order.
        global_batch: samples a step over all workers.
        window: chunks of a lane that are shuffled together.
        shuffle: False keeps the order on disk, for evaluation and embedding.
        within: numbers of the chunks that the plan goes through; None: all.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        seed: int,
        global_batch: int,
        window: int = 4,
        shuffle: bool = True,
        within: np.ndarray | None = None,
    ) -> None:
        if global_batch < 1 or window < 1:
            raise ConfigError(f"A batch and a window need at least 1, not {global_batch} and {window}.")
        kinds = {corpus.kind for corpus in corpora}
        if len(kinds) != 1:
            raise ConfigError(f"The corpora of a plan must be of one kind, not {', '.join(sorted(kinds)) or 'none'}.")
        self.corpora = list(corpora)
        self.kind = corpora[0].kind
        self.seed, self.global_batch, self.window, self.shuffle = seed, global_batch, window, shuffle
        self._corpus, self._fragment, self._row_group, self._rows, lanes = _chunk_arrays(self.corpora, shuffle)
        chosen = np.arange(len(lanes)) if within is None else within
        self.samples = int(self._rows[chosen].sum())
        if self.samples == 0:
            raise DataError(f"Corpus {corpora[0].root} has no samples.")
        self.steps_per_epoch = -(-self.samples // global_batch)
        order = chosen[np.argsort(lanes[chosen], kind="stable")]
        _, firsts = np.unique(lanes[order], return_index=True)
        self._lanes = np.split(order, firsts[1:])  # chunk numbers of each lane, in the order on disk
        self._sizes = np.array([int(self._rows[chunks].sum()) for chunks in self._lanes], dtype=np.int64)
        self._last_cut: tuple[int, np.ndarray] | None = None
        self._epochs: OrderedDict[int, _EpochOrder] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @property
    def lanes(self) -> int:
        """Lanes that hold samples, over all corpora."""
        return len(self._lanes)

    @property
    def digest(self) -> str:
        """16 hex digits that change with anything that changes the order; a checkpoint keeps it."""
        described = {
            "corpora": [corpus.model_dump(include={"kind", "lanes", "fragments"}) for corpus in self.corpora],
            "plan": [self.seed, self.global_batch, self.window, self.shuffle],
        }
        return hashlib.blake2b(orjson.dumps(described, option=orjson.OPT_SORT_KEYS), digest_size=8).hexdigest()

    def chunk(self, number: int) -> Chunk:
        """Where a chunk is."""
        return Chunk(
            int(self._corpus[number]),
            int(self._fragment[number]),
            int(self._row_group[number]),
            int(self._rows[number]),
        )

    def step(self, epoch: int, step: int) -> StepSamples:
        """The samples of one step over all workers."""
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"there is no step {step} of epoch {epoch}: an epoch has {self.steps_per_epoch} steps")
        first = step * self.global_batch
        chunk, row = self.stretch(epoch, first, min(first + self.global_batch, self.samples))
        return StepSamples(epoch, step, chunk, row, np.full(len(chunk), epoch))

    def stretch(self, epoch: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Chunks and rows of the samples at positions first..last of an epoch, 0 <= first < last <= samples."""
        start, stop = self._cut(first), self._cut(last)
        parts = [
            self._samples(epoch, int(lane), int(start[lane]), int(stop[lane])) for lane in np.flatnonzero(stop > start)
        ]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _cut(self, position: int) -> np.ndarray:
        """Samples of each lane before a position of the epoch; a step's end is the next one's start."""
        found = self._last_cut
        if found is None or found[0] != position:
            found = self._last_cut = (position, taken(self._sizes, position))
        return found[1]

    def _samples(self, epoch: int, lane: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples start..stop of a lane's order: chunk numbers and rows."""
        order = self._order(epoch)
        starts = order.window_starts[lane]
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        chunks, rows = [], []
        for window in range(first, last):
            chunk, row = self._window(epoch, lane, window)
            part = slice(max(start - int(starts[window]), 0), stop - int(starts[window]))
            chunks.append(chunk[part])
            rows.append(row[part])
        return np.concatenate(chunks), np.concatenate(rows)

    def _order(self, epoch: int) -> _EpochOrder:
        if epoch not in self._epochs:
            chunks, starts = [], []
            for lane, numbers in enumerate(self._lanes):
                if self.shuffle:
                    numbers = numbers[permutation(len(numbers), self.seed, epoch, _CHUNKS, lane)]
                before = np.concatenate([[0], np.cumsum(self._rows[numbers])])
                chunks.append(numbers)
                starts.append(np.append(before[:-1][:: self.window], before[-1]))
            self._epochs[epoch] = _EpochOrder(chunks, starts)
            while len(self._epochs) > 2:  # this one and the one a loader reads ahead into
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window(self, epoch: int, lane: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """All samples of a window in order; the current ones are kept."""
        key = (epoch, lane, window)
        found = self._windows.get(key)
        if found is None:
            numbers = self._order(epoch).chunks[lane][window * self.window : (window + 1) * self.window]
            chunk = np.repeat(numbers, self._rows[numbers])
            row = np.concatenate([np.arange(rows) for rows in self._rows[numbers]])
            if self.shuffle:
                shuffled = permutation(len(chunk), self.seed, epoch, _ROWS, lane, window)
                chunk, row = chunk[shuffled], row[shuffled]
            found = self._windows[key] = (chunk, row)
            while len(self._windows) > 2 * len(self._lanes):
                self._windows.popitem(last=False)
        else:
            self._windows.move_to_end(key)
        return found


def _chunk_arrays(corpora: Sequence[Corpus], shuffle: bool) -> tuple[np.ndarray, ...]:
    """Corpus, fragment, row group, rows and lane of every chunk that holds rows, int64 [chunks] each."""
    columns: list[tuple[int, int, int, int, int]] = []
    base = 0
    for c, corpus in enumerate(corpora):
        number = 0
        for f, fragment in enumerate(corpus.fragments):
            if fragment.lanes is not None and len(fragment.lanes) != len(fragment.row_groups):
                raise DataError(
                    f"{corpus.fragment_url(fragment)} has {len(fragment.row_groups)} row groups, but corpus.json names "
                    f"{len(fragment.lanes)} lanes for them."
                )
            for g, rows in enumerate(fragment.row_groups):
                lane = number % RAW_LANES if fragment.lanes is None else fragment.lanes[g]
                if rows:
                    columns.append((c, f, g, rows, base + lane if shuffle else 0))
                number += 1
        base += max([RAW_LANES, *(lane + 1 for f in corpus.fragments for lane in f.lanes or ())])
    table = np.array(columns, dtype=np.int64).reshape(-1, 5)
    return tuple(table[:, i].copy() for i in range(5))
