"""Global stages whose reductions are spread over tasks: map partials, keyed partitions, reduce tasks, one commit.

A `KeyedStage` is a `partial` on every fragment followed by rounds. A task of a round reads the rows that earlier tasks
sent to it and sends rows on: named streams of rows, each row with the number of the task that gets it, or for
everyone. A round runs over the *partitions*, whose number grows with the corpus, over the *fragments*, where it can
read columns, or over *groups* of neighbouring fragments, which are summed up before anything is sent. So no task holds
more than its share of the corpus, and the driver holds nothing but numbers.

    partial --digests--> P tasks --pairs--> fragments --edges--> P tasks, again and again --verdicts--> fragments

The last stream is what `apply` sees. What a stage decides must not depend on the number of partitions. Between tasks a
row goes by its reference, an int64: its fragment in the upper 32 bits, its place among the rows that the stage sees
there in the lower.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa

from cl.corpus import Kind
from pipelines.shuffle import Routed
from pipelines.stages.base import Columns, Output, Rows, Stage

Streams = dict[str, Routed]
GROUPS = 256  # of fragments, at most: sums of one task each; a constant, because the order of sums is part of a result


@dataclass
class Inbox:
    """What one task of a round works on.

    Attributes:
        task: its number: of a partition, a fragment or a group of fragments.
        streams: name -> the rows that were sent to it, in the order of the senders.
        partitions: how many partitions there are.
        columns: access to the columns of fragments that the stage needs.
        all_fragments: how many fragments there are.
        written: (stream, task) -> all that this task of an earlier round wrote to the stream, to whomever: what every
            task needs is written once and not sent.
        fragments: those that the task stands for; none if it is a partition's.
        own: fragments from this number on are of finished curations: their rows stay.
    """

    task: int
    streams: dict[str, pa.Table]
    partitions: int
    columns: Columns
    kind: Kind
    seed: int
    all_fragments: int
    written: Callable[[str, int], pa.Table]
    fragments: range = range(0)
    own: int = 1 << 31

    def standing(self, references: np.ndarray) -> np.ndarray:
        """bool: whether rows are kept ones of a finished curation."""
        return fragment_of(references) >= self.own


@dataclass(frozen=True)
class Round:
    """Tasks that run side by side.

    Attributes:
        over: one task a partition, a fragment, or a group of fragments.
        reads: streams it reads; one that nobody has written yet is left out.
        writes: streams it writes, all of them in every task.
        run: from what a task got to what it sends.
        repeats: streams that the round both reads and writes: it runs again on what it wrote to them, until that is
            nothing. Empty: it runs once.
    """

    name: str
    over: Literal["partitions", "fragments", "groups"]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[[Inbox], Streams]
    repeats: tuple[str, ...] = ()


class KeyedStage(Stage):
    """A stage that needs the whole corpus, in rounds of bounded tasks."""

    sends: ClassVar[tuple[str, ...]] = ()  # streams that `partial` writes
    result: ClassVar[str] = "verdicts"  # the stream, sent to fragments, that `apply` reads

    @abstractmethod
    def partial(self, rows: Rows, partitions: int) -> Streams:
        """What a fragment sends to the first round."""

    @abstractmethod
    def rounds(self) -> list[Round]:
        """The rounds in their order."""

    @abstractmethod
    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        """Columns and drops of the rows of one fragment from what the rounds sent to it."""


def group_of_fragments(group: int, fragments: int) -> range:
    """The fragments of a group: neighbours, as many in each as can be."""
    groups = min(fragments, GROUPS)
    return range(group * fragments // groups, (group + 1) * fragments // groups)


def references(rows: Rows) -> np.ndarray:
    """int64 [n]: the references of a fragment's rows."""
    return np.asarray((np.int64(rows.fragment) << 32) + np.arange(len(rows)))


def fragment_of(references: np.ndarray) -> np.ndarray:
    """int64: the fragments of rows."""
    return references >> 32


def place_of(references: np.ndarray) -> np.ndarray:
    """int32: the places of rows among those of their fragment that the stage sees."""
    return (references & 0xFFFFFFFF).astype(np.int32)
