"""What a plan is: which samples each step of a run holds, the same for any number of workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from cl.corpus import Corpus


@dataclass(frozen=True)
class Chunk:
    """One row group: the unit of reading."""

    corpus: int
    fragment: int
    row_group: int
    rows: int


@dataclass(frozen=True)
class StepSamples:
    """The samples of one step in order: row `row[i]` of chunk `chunk[i]`, int64 [n], n at most the global batch.

    `turn[i]` counts how often the run has been through all that the sample belongs to: what is drawn for it changes
    with each.
    """

    epoch: int
    step: int
    chunk: np.ndarray
    row: np.ndarray
    turn: np.ndarray

    def __len__(self) -> int:
        return len(self.chunk)

    def at(self, places: slice | np.ndarray) -> StepSamples:
        """Some of them, in that order."""
        return StepSamples(self.epoch, self.step, self.chunk[places], self.row[places], self.turn[places])


class Plan(ABC):
    """Which samples each step holds: a function of (epoch, step) alone.

    Attributes:
        corpora: what is trained on, of one kind.
        kind: theirs.
        seed: fixes the order.
        global_batch: samples a step over all workers.
        samples: of an epoch.
        steps_per_epoch: the last of them may be short.
    """

    corpora: list[Corpus]
    kind: str
    seed: int
    global_batch: int
    samples: int
    steps_per_epoch: int

    @property
    @abstractmethod
    def digest(self) -> str:
        """16 hex digits that change with anything that changes the order; a checkpoint keeps it."""

    @abstractmethod
    def chunk(self, number: int) -> Chunk:
        """Where a chunk is."""

    @abstractmethod
    def step(self, epoch: int, step: int) -> StepSamples:
        """The samples of one step over all workers; ValueError if there is no such step."""

    def next(self, epoch: int, step: int) -> tuple[int, int]:
        """The (epoch, step) that follows."""
        return (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def at(self, global_step: int) -> tuple[int, int]:
        """The (epoch, step) of the step that has `global_step` steps before it."""
        return divmod(global_step, self.steps_per_epoch)

    def part(self, samples: StepSamples, rank: int, world: int) -> StepSamples:
        """One worker's part of a step: positions [rank * G / world, (rank + 1) * G / world) of the global batch G.

        The last step of an epoch may be short; then the last workers get fewer samples, or none.
        """
        return samples.at(slice(*self.part_bounds(rank, world)))

    def part_bounds(self, rank: int, world: int) -> tuple[int, int]:
        """The positions of the global batch that a worker holds."""
        return rank * self.global_batch // world, (rank + 1) * self.global_batch // world
