"""No two samples of a step alike: what in-batch negatives assume, kept by the batch rather than by a mask.

(sentence-transformers' `NoDuplicatesBatchSampler` skips a sample whose text the batch has; here it changes places with
a sample of another step, so that none is left out and none comes late.)

    arrange: distinct                                # no caption, no picture twice in a step
    arrange: {name: distinct, by: [anchor, positive, meta.document]}

A value that occurs in the pool more often than the pool has steps cannot be kept apart: it is spread as evenly as it
goes, and objectives mask what is left by content, as they do without an arrangement.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cl.batches.arrangements.base import ARRANGEMENTS, Arrangement, fill


@ARRANGEMENTS.register("distinct", "no two samples of a step hold the same in any of the columns")
class Distinct(Arrangement):
    """Samples that share something are placed first, the most frequent values before all and always where most room is,
    which keeps apart whatever can be (Gale and Ryser 1957, for one column); the others fill up.
    """

    keys = None

    def deal(self, keys: np.ndarray, home: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
        counts = np.stack([_occurrences(column) for column in keys.T], 1)
        often, value = counts.max(1), keys[np.arange(len(keys)), counts.argmax(1)]
        order = np.lexsort((np.arange(len(keys)), value, -often))
        room = sizes.copy()
        held: list[set[tuple[int, int]]] = [set() for _ in sizes]
        step = np.full(len(keys), -1)
        left = []
        for sample in order[: int((often > 1).sum())].tolist():
            values = list(enumerate(keys[sample].tolist()))
            found = _free(values, room, held, int(home[sample]))
            if found is None:
                left.append(sample)
                continue
            step[sample] = found
            room[found] -= 1
            held[found].update(values)
        for sample in left:  # steps with most room have fewest of the frequent values
            step[sample] = int(room.argmax())
            room[step[sample]] -= 1
        return fill(step, home, room)


def _occurrences(column: np.ndarray) -> np.ndarray:
    """[n]: how often each row's value occurs."""
    _, inverse, counts = np.unique(column, return_inverse=True, return_counts=True)
    return counts[inverse]


def _free(
    values: Iterable[tuple[int, int]], room: np.ndarray, held: list[set[tuple[int, int]]], home: int
) -> int | None:
    """The step with most room of those that hold none of the values; among equals the sample's own."""
    for step in np.lexsort((np.arange(len(room)) != home, -room)).tolist():
        if room[step] and held[step].isdisjoint(values):
            return step
    return None
