"""A plan whose samples are dealt out anew among a pool of steps, by what they are.

A pool is `pool` consecutive steps of an epoch, the last one of an epoch maybe fewer. Its samples are those that the
steps have without an arrangement, so an epoch holds every sample as often as before, batches are as long, and any step
is found from (seed, epoch, step) alone, on any number of workers. Each worker reads the columns that are compared for
all samples of the pool; memory is O(pool x global batch).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import orjson

from cl.batches.arrangements import ArrangeConfig, build_arrangement
from cl.batches.hashing import mix
from cl.batches.labels import LabelConfig, open_labels
from cl.batches.mixture import MixedPlan, MixtureConfig
from cl.batches.plan import BatchPlan
from cl.batches.reader import CorpusReader
from cl.batches.steps import Chunk, Plan, StepSamples
from cl.corpus import VIEWS, Corpus
from cl.errors import ConfigError

_POOL = 7  # what a hash is for
_CACHE_MIB = 256  # of rows that were read for the sake of their columns


class ArrangedPlan(Plan):
    """A plan with its samples arranged.

    Args:
        plan: which samples each pool holds.
        config: the arrangement.

    Raises:
        ConfigError: a column that a corpus does not have, or whose values cannot be compared.
    """

    def __init__(self, plan: Plan, config: ArrangeConfig) -> None:
        self.plan, self.config = plan, config
        self.arrangement = build_arrangement(config)
        self.corpora, self.kind, self.seed = plan.corpora, plan.kind, plan.seed
        self.global_batch, self.samples, self.steps_per_epoch = plan.global_batch, plan.samples, plan.steps_per_epoch
        fields = VIEWS[plan.kind]
        self._by = list(fields) if config.by is None else config.by
        columns = {name: LabelConfig(column=name, kind="class") for name in self._by if name not in fields}
        labels = open_labels(columns, plan.corpora)
        for label in labels:
            if label.width is not None:
                raise ConfigError(
                    f"arrange.by names {label.name!r}, whose values are lists; it compares single values."
                )
        self._fields = [name for name in self._by if name in fields]
        self._reader = CorpusReader(plan, self._fields, _CACHE_MIB, labels)
        self._pools: OrderedDict[tuple[int, int], list[StepSamples]] = OrderedDict()

    @property
    def digest(self) -> str:
        """16 hex digits that change with anything that changes the order; a checkpoint keeps it."""
        described = [self.plan.digest, self.config.model_dump(mode="json")]
        return hashlib.blake2b(orjson.dumps(described, option=orjson.OPT_SORT_KEYS), digest_size=8).hexdigest()

    def chunk(self, number: int) -> Chunk:
        """Where a chunk is."""
        return self.plan.chunk(number)

    def step(self, epoch: int, step: int) -> StepSamples:
        """The samples of one step over all workers; within it they keep the order that they had in the pool."""
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            return self.plan.step(epoch, step)  # which says what is wrong
        key = (epoch, step // self.config.pool)
        if key not in self._pools:
            self._pools[key] = self._pool(*key)
            while len(self._pools) > 2:  # this one and the one that a loader reads ahead into
                self._pools.popitem(last=False)
        return self._pools[key][step % self.config.pool]

    def _pool(self, epoch: int, number: int) -> list[StepSamples]:
        first = number * self.config.pool
        last = min(first + self.config.pool, self.steps_per_epoch)
        steps = [self.plan.step(epoch, step) for step in range(first, last)]
        sizes = np.array([len(each) for each in steps])
        chunk, row, turn = (
            np.concatenate([getattr(each, name) for each in steps]) for name in ("chunk", "row", "turn")
        )
        seed = int(mix(self.seed, _POOL, epoch, number))
        home = np.repeat(np.arange(len(steps)), sizes)
        dealt = self.arrangement.deal(self._keys(chunk, row), home, sizes, seed)
        if not np.array_equal(np.bincount(dealt, minlength=len(sizes)), sizes):
            raise ConfigError(f"The arrangement {self.config.name!r} gives a step more or fewer samples than it had.")
        order = np.split(np.argsort(dealt, kind="stable"), np.cumsum(sizes)[:-1])
        return [
            StepSamples(epoch, first + at, chunk[places], row[places], turn[places]) for at, places in enumerate(order)
        ]

    def _keys(self, chunk: np.ndarray, row: np.ndarray) -> np.ndarray:
        """[n, K]: what the samples hold in each column."""
        keys = np.empty((len(chunk), len(self._by)), np.int64)
        for number in np.unique(chunk):
            mine = np.flatnonzero(chunk == number)
            rows = self._reader.rows(int(number))
            for place, name in enumerate(self._by):
                values = rows.labels[name] if name in rows.labels else rows.content[:, self._fields.index(name)]
                keys[mine, place] = values[row[mine]]
        return keys


def make_plan(
    corpora: Sequence[Corpus],
    seed: int,
    global_batch: int,
    mixture: MixtureConfig | None = None,
    arrange: ArrangeConfig | None = None,
) -> Plan:
    """The plan of a run: every sample once an epoch, or the composition that the config asks for."""
    plan: Plan
    if mixture is None:
        plan = BatchPlan(corpora, seed, global_batch)
    else:
        plan = MixedPlan(corpora, seed, global_batch, mixture)
    return plan if arrange is None else ArrangedPlan(plan, arrange)
