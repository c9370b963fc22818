"""The composition of global batches from parts: corpora, or the values of a column such as source or language.

    mixture: {exponent: 0.5}                             # parts in proportion to the square root of their sizes
    mixture: {by: source, homogeneous: true}             # each step from one source
    mixture: {weights: {runs/a: 3, runs/b: 1}, exponent: 0}   # three samples of a for one of b

    share of a part = weight * samples^exponent / sum of these            exponent 1: as they are, 0: all alike

Multilingual models take exponents of .3 to .7 (Conneau and Lample 2019, "Cross-lingual Language Model Pretraining",
section 3.1); homogeneous batches keep the source from being the easiest way to tell a negative (Li et al. 2023,
"Towards General Text Embeddings with Multi-stage Contrastive Learning", section 3.2; Nussbaum et al. 2024, "Nomic
Embed", section 4).

Each part is a stream of its own passes: all its samples are seen before any of them is seen again. Webster's
apportionment says how many samples (or, homogeneous, steps) of each part come before any step, so a step's samples are
a function of (seed, step) alone: the composition holds for the global batch, whatever the number of workers. There are
no short batches; an epoch is as many steps as hold the samples of all parts, and a sample that comes twice in it is
augmented anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from cl import storage
from cl.batches.apportion import taken
from cl.batches.hashing import mix
from cl.batches.plan import BatchPlan
from cl.batches.steps import StepSamples
from cl.config import Config
from cl.corpus import Corpus
from cl.errors import ConfigError, DataError

_PART = 6  # what a hash is for
_FINE = 2**48  # shares are this fine, and no stream is longer


class MixtureConfig(Config):
    """How a global batch is made of parts."""

    by: str = Field(
        "corpus", description="what a part is: a corpus, or a column with one value throughout each row group"
    )
    exponent: float = Field(1.0, ge=0, le=1, description="a part's share goes with its size to this power")
    weights: dict[str, float] = Field(
        {}, description="part (path of a corpus, or value of the column) -> weight of its share; others have 1"
    )
    homogeneous: bool = Field(False, description="each step takes all its samples from one part")

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: dict[str, float]) -> dict[str, float]:
        for part, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {part!r} must be a positive number, not {weight}")
        return weights


class MixedPlan(BatchPlan):
    """A plan whose steps are composed of parts.

    Args:
        corpora, seed, global_batch, window: as for `BatchPlan`.
        config: the composition.

    Raises:
        ConfigError: a column that does not divide the row groups, or a weight of a part that there is not.
    """

    def __init__(
        self, corpora: Sequence[Corpus], seed: int, global_batch: int, config: MixtureConfig, window: int = 4
    ) -> None:
        super().__init__(corpora, seed, global_batch, window)
        self.config = config
        members = self._members()
        unknown = sorted(set(config.weights) - set(members))
        if unknown:
            raise ConfigError(f"mixture.weights names {unknown[0]!r}, but the parts are {', '.join(sorted(members))}.")
        self.parts = {
            name: BatchPlan(corpora, int(mix(seed, _PART, number)) >> 1, global_batch, window, within=chunks)
            for number, (name, chunks) in enumerate(members.items())
        }
        sizes = np.array([part.samples for part in self.parts.values()], dtype=np.float64)
        wanted = np.array([config.weights.get(name, 1.0) for name in self.parts]) * sizes**config.exponent
        self.shares = np.maximum((wanted / wanted.sum() * _FINE).astype(np.int64), 1)
        self.samples = self.steps_per_epoch * global_batch

    @property
    def digest(self) -> str:
        """16 hex digits that change with anything that changes the order; a checkpoint keeps it."""
        described = [super().digest, self.config.model_dump(mode="json")]
        return hashlib.blake2b(orjson.dumps(described, option=orjson.OPT_SORT_KEYS), digest_size=8).hexdigest()

    def step(self, epoch: int, step: int) -> StepSamples:
        """The samples of one step over all workers, in the order of their parts."""
        if epoch < 0 or not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"there is no step {step} of epoch {epoch}: an epoch has {self.steps_per_epoch} steps")
        number = epoch * self.steps_per_epoch + step
        start, stop = self._before(number), self._before(number + 1)
        found = [
            piece
            for part, low, high in zip(self.parts.values(), start.tolist(), stop.tolist(), strict=True)
            for piece in _stream(part, low, high)
        ]
        chunk, row, turn = (np.concatenate(each) for each in zip(*found, strict=True))
        return StepSamples(epoch, step, chunk, row, turn)

    def _before(self, steps: int) -> np.ndarray:
        """How many samples of each part are in the first `steps` steps of the run."""
        if self.config.homogeneous:
            return taken(self.shares, steps) * self.global_batch
        return taken(self.shares, steps * self.global_batch)

    def _members(self) -> dict[str, np.ndarray]:
        """Part -> its chunks: corpora in their order, values in the alphabet's."""
        if self.config.by == "corpus":
            held = {corpus.root: np.flatnonzero(self._corpus == c) for c, corpus in enumerate(self.corpora)}
            return {root: chunks for root, chunks in held.items() if len(chunks)}
        names = np.array(self._values(), dtype=object)
        return {name: np.flatnonzero(names == name) for name in sorted(set(names))}

    def _values(self) -> list[str]:
        """The value of the column in each chunk, by the statistics of the row groups."""
        found: list[str] = []
        metadata: tuple[str, pq.FileMetaData] = ("", None)
        for number in range(len(self._rows)):
            chunk = self.chunk(number)
            corpus = self.corpora[chunk.corpus]
            url = corpus.fragment_url(corpus.fragments[chunk.fragment])
            if metadata[0] != url:
                metadata = (url, _metadata(url))
            found.append(self._value(metadata[1], chunk.row_group, url))
        return found

    def _value(self, metadata: Any, row_group: int, url: str) -> str:
        names = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
        if self.config.by not in names:
            raise ConfigError(f"mixture.by names the column {self.config.by!r}, which {url} does not have.")
        known = metadata.row_group(row_group).column(names.index(self.config.by)).statistics
        if known is None or not known.has_min_max or known.null_count or known.min != known.max:
            raise ConfigError(
                f"mixture.by is {self.config.by!r}, but row group {row_group} of {url} has no single value of it: "
                "parts are made of whole row groups. Make a corpus of each value, and mix by corpus."
            )
        return str(known.min)


def _metadata(url: str) -> Any:
    fs, path = storage.open_fs(url)
    try:
        with fs.open(path, "rb") as raw:
            return pq.read_metadata(raw)
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{url} is not a readable parquet file: {error}.") from error


def _stream(part: BatchPlan, start: int, stop: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Samples start..stop of a part's passes, one after the other: chunks, rows, and which pass."""
    found = []
    while start < stop:
        turn, low = divmod(start, part.samples)
        high = min(low + stop - start, part.samples)
        found.append((*part.stretch(turn, low, high), np.full(high - low, turn)))
        start += high - low
    return found
