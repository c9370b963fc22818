"""What a stage is: a typed config that says which columns it reads and writes, and how.

There are two kinds. A `RowStage` looks at the rows of one fragment at a time. A `GlobalStage` needs to see the whole
corpus: every fragment gives a small `partial`, one task reduces the partials, and the result is applied to each
fragment. A stage never removes a row; it writes columns and may give a reason to drop, and `pipelines.plan` sees to it
that later stages look only at rows that are still alive.

    @STAGES.register("shout", "Drop captions in capital letters")
    class Shout(RowStage):
        drops: ClassVar[bool] = True
        def needs(self, kind): return ["text"]
        def run(self, rows):
            loud = np.array([text.isupper() for text in rows.texts("text")], bool)
            return Output(drop=reasons(len(rows), {"capitals": loud}))

What a stage computes must depend on its config, its rows and `rows.seed` alone: not on the number of workers, the
order of arrival or the clock.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa

from cl.config import Config
from cl.corpus import VIEWS, Corpus, Kind
from cl.errors import ConfigError


@dataclass
class Output:
    """What a stage says about n rows.

    Attributes:
        columns: name -> n values.
        drop: n reasons, None where the row stays; None if no row is dropped.
        broken: position -> what is wrong with the sample; such rows go to the quarantine.
    """

    columns: dict[str, Any] = field(default_factory=dict)
    drop: Sequence[str | None] | np.ndarray | None = None
    broken: dict[int, str] = field(default_factory=dict)


@dataclass
class Rows:
    """Rows of one fragment that are still alive, with the columns that the stage asked for.

    Attributes:
        table: n rows; the columns of `needs`, and always `id`.
        positions: int32 [n], where each row stands in its fragment.
        fragment: number of the fragment.
        corpus: where the heavy plane is.
        seed: the run's seed, for keyed choices (see `pipelines.keyed`).
        standing: whether these are kept rows of a finished curation, beside which new ones are judged: they stay.
        beside: how many samples there are beside those of the corpus.
    """

    table: pa.Table
    positions: np.ndarray
    fragment: int
    corpus: Corpus
    seed: int = 0
    standing: bool = False
    beside: int = 0

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def texts(self, column: str) -> list[str]:
        """A text column as strings; null counts as empty."""
        return [value or "" for value in self.table[column].to_pylist()]

    def strings(self, column: str) -> pa.StringArray:
        """A text column in one piece; null counts as empty."""
        return whole(self.table[column]).cast(pa.string()).fill_null("")

    def numbers(self, column: str) -> np.ndarray:
        """A numeric column as float64 [n], NaN for null."""
        values = self.table[column].cast(pa.float64()).to_numpy(zero_copy_only=False)
        return np.asarray(values, np.float64)

    def vectors(self, column: str) -> np.ndarray:
        """An embedding column as float32 [n, D]."""
        return vectors(self.table[column])

    def images(self) -> Iterator[bytes | None]:
        """The encoded images in row order, None for one whose bytes are not there (the shard ends before)."""
        from pipelines.heavy import read_rows

        return read_rows(self.corpus, self.table)


class Stage(Config):
    """Base of all stages; a subclass is a pydantic model whose fields are the stage's settings."""

    name: ClassVar[str] = ""  # set when the stage is registered and planned
    version: ClassVar[int] = 1  # raise it when the same config gives other results
    kinds: ClassVar[tuple[Kind, ...]] = ("image-text", "text-text")  # corpora it works on
    drops: ClassVar[bool] = False  # whether it may drop or quarantine rows
    unkeyed: ClassVar[frozenset[str]] = frozenset()  # fields that do not change its results
    seeded: ClassVar[bool] = False  # whether its results depend on the run's seed
    pixels: ClassVar[bool] = False  # whether it looks at decoded images (`measure`)
    # How a curation `against` a finished one judges new rows, where other rows matter: by what that one found out
    # (statistics), beside its kept rows, which stay (rows), or as ever, if no other row matters (anew). "": not at all.
    frozen: ClassVar[Literal["statistics", "rows", "anew", ""]] = ""
    broken_reason: ClassVar[str] = "undecodable_image"  # the quarantine's reason for its broken rows

    def needs(self, kind: Kind) -> list[str]:
        """Columns it reads, of the corpus or of earlier stages."""
        return []

    def makes(self, kind: Kind) -> list[pa.Field]:
        """Columns it writes."""
        return []

    def before(self, kind: Kind) -> list[Stage]:
        """Stages that must have run; the plan puts them in where the config does not list them."""
        return []

    def resolve(self, model: str | None, kind: Kind) -> Stage:
        """The stage with what the run's config gives to all stages filled in (the model).

        Raises:
            ConfigError: something is missing.
        """
        return self

    def freeze(self, reduced: pa.Table) -> pa.Table:
        """What `apply` gets in a curation against a finished one, from what its rounds or reduction ended with there.

        Only of stages that are frozen by statistics.
        """
        return reduced

    def digest(self) -> str:
        """What its results depend on beside its fields: the digest of a model's weights, say."""
        return ""


class RowStage(Stage):
    """A stage that looks at one fragment at a time.

    `actors` > 0 runs it in that many Ray actors, each of which calls `open` once (models); 0 in tasks.
    """

    actors: ClassVar[int] = 0

    def pool(self) -> tuple[int, float, float]:
        """Number of actors (0: tasks), CPUs and GPUs of each."""
        return self.actors, 1.0, 0.0

    def open(self) -> Callable[[Rows], Output]:
        """What processes rows; loads whatever is heavy, once a worker."""
        return self.run

    def run(self, rows: Rows) -> Output:
        """Columns and drops of the rows of one fragment."""
        raise TypeError(f"{type(self).__name__} must define run(rows), or open() for what is loaded once a worker.")


class PixelStage(RowStage):
    """A stage that looks at decoded images; one decode serves all pixel stages that run together.

    An image that cannot be decoded goes to the quarantine before `finish` sees it.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("image-text",)
    drops: ClassVar[bool] = True
    pixels: ClassVar[bool] = True

    @abstractmethod
    def measure(self, pixels: np.ndarray) -> Any:
        """What the stage keeps of one image, uint8 [H, W, 3], its short side at least `heavy.SHORT_SIDE` or its own."""

    @abstractmethod
    def finish(self, rows: Rows, measured: list[Any]) -> Output:
        """Columns and drops from the measures of the rows' images."""


class Columns(Protocol):
    """Access of a reduction to columns of fragments, beyond the partials."""

    def read(self, fragment: int, column: str) -> pa.ChunkedArray:
        """A column of the rows of a fragment that the partial saw, in their order."""
        ...


@dataclass
class Context:
    """What a reduction may use beside the partials."""

    columns: Columns
    kind: Kind
    seed: int
    fragments: int


class GlobalStage(Stage):
    """A stage that needs the whole corpus: partials by fragment, one reduction, an application to each fragment."""

    @abstractmethod
    def partial(self, rows: Rows) -> pa.Table:
        """The little that the reduction needs of a fragment; may have any number of rows."""

    @abstractmethod
    def reduce(self, partials: Sequence[pa.Table], context: Context) -> pa.Table | list[pa.Table]:
        """One table that every fragment gets, or a list with one for each fragment."""

    @abstractmethod
    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        """Columns and drops of the rows of one fragment."""


def reasons(rows: int, masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """One drop reason a row, object [rows]: the first whose mask (bool [rows]) is true, else None."""
    out = np.full(rows, None, dtype=object)
    for reason, mask in reversed(list(masks.items())):
        out[np.asarray(mask, bool)] = reason
    return out


def vectors(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A fixed-size list column as float32 [n, D]."""
    array = whole(column)
    width = array.type.list_size
    return np.asarray(array.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(-1, width)


def whole(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column in one piece."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # no chunk at all
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    return array


def vector_array(values: np.ndarray) -> pa.FixedSizeListArray:
    """float16 [n, D] as a fixed-size list array."""
    half = np.ascontiguousarray(values, dtype=np.float16)
    return pa.FixedSizeListArray.from_arrays(pa.array(half.ravel(), pa.float16()), half.shape[1])


def text_fields(kind: Kind) -> list[str]:
    """The texts of a sample: `text`, or `anchor` and `positive`."""
    return [view for view, modality in VIEWS[kind].items() if modality == "text"]


def merged(masks: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Reason -> whether any text of a sample has it, from a mask for each text."""
    return {reason: np.logical_or.reduce(parts) for reason, parts in masks.items() if parts}


def internal(name: str, kind: pa.DataType) -> pa.Field:
    """A column that serves other stages or the report, and is not carried into the curated corpus unless asked for."""
    return pa.field(name, kind, metadata={"internal": "yes"})


def require_kind(stage: Stage, kind: Kind) -> None:
    """Refuse a stage on a corpus it does not work on."""
    if kind not in stage.kinds:
        raise ConfigError(f"Stage {stage.name!r} works on {' and '.join(stage.kinds)} corpora, but this one is {kind}.")
