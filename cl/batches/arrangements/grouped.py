"""Several samples of each class in a step: positives for objectives that learn from labels.

    labels: {class: class}
    objective: {name: supcon}
    arrange: {name: grouped, by: class, each: 4}

A step of G samples holds G / `each` classes with `each` samples of every one, where the pool has as many ("PK
sampling": Hermans et al. 2017, "In Defense of the Triplet Loss for Person Re-Identification"). A class does
not come twice in a step while there are others. Samples that do not fill a group stand alone.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from cl.batches.arrangements.base import ARRANGEMENTS, Arrangement, fill
from cl.batches.hashing import mix
from cl.config import Config


class GroupedConfig(Config):
    each: int = Field(2, ge=2, description="samples of a class in a step")


@ARRANGEMENTS.register(
    "grouped",
    "several samples of each class in a step",
    "In Defense of the Triplet Loss for Person Re-Identification",
)
class Grouped(Arrangement):
    """Whole groups first, each where most room is and its class is not; then the rest."""

    Config = GroupedConfig

    def deal(self, keys: np.ndarray, home: np.ndarray, sizes: np.ndarray, seed: int) -> np.ndarray:
        each = self.config.each
        values = keys[:, 0]
        order = np.lexsort((mix(seed, np.arange(len(values))), values))  # which samples are grouped is drawn
        starts = np.flatnonzero(np.concatenate([[True], np.diff(values[order]) != 0]))
        groups = [
            order[first + at : first + at + each]
            for first, last in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True)
            for at in range(0, last - first - each + 1, each)
        ]
        step, room = np.full(len(values), -1), sizes.copy()
        held: list[set[int]] = [set() for _ in sizes]
        for number in np.argsort(mix(seed, 1, np.arange(len(groups))), kind="stable"):
            members = groups[number]
            value = int(values[members[0]])
            roomy = [at for at in np.argsort(-room, kind="stable").tolist() if room[at] >= each]
            if not roomy:
                break
            found = next((at for at in roomy if value not in held[at]), roomy[0])
            step[members] = found
            room[found] -= each
            held[found].add(value)
        return fill(step, home, room)
