"""Embeddings that `clew embed` wrote, as further views of a batch: a teacher that was asked once, for the whole corpus.

    STORED/00007.parquet    of fragment 7: id, and VIEW_embedding for each field, float16, of length 1

They are of whole, unaugmented samples. A sample that the embedding run could not decode is listed in
STORED/broken/00007.json and has none: it is masked in training for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cl import storage
from cl.corpus import Corpus
from cl.errors import ConfigError, DataError


@dataclass(frozen=True)
class StoredView:
    """One view's stored embeddings.

    Attributes:
        name: of the view in the batch.
        column: in the files.
        folders: one for each corpus of the run, in their order.
        width: dimensions.
    """

    name: str
    column: str
    folders: Sequence[str]
    width: int

    def empty(self, rows: int) -> np.ndarray:
        """float32 [rows, width] of zeros."""
        return np.zeros((rows, self.width), np.float32)

    def read(self, corpus: int, fragment: int, ids: Sequence[str]) -> np.ndarray:
        """The embeddings of samples of one fragment, float32 [n, width]; zeros for those that could not be embedded.

        Raises:
            DataError: the file is missing or broken, or has no embedding of a sample that could be embedded.
        """
        url = storage.join(self.folders[corpus], f"{fragment:05d}.parquet")
        table = _read(url, ["id", self.column])
        place = {key: row for row, key in enumerate(table["id"].to_pylist())}
        values = table[self.column].combine_chunks()
        stored = values.flatten().to_numpy().reshape(-1, self.width)
        found = self.empty(len(ids))
        rows = np.array([place.get(key, -1) for key in ids])
        found[rows >= 0] = stored[rows[rows >= 0]]
        lacking = [key for key, row in zip(ids, rows, strict=True) if row < 0]
        if lacking:
            broken = storage.join(self.folders[corpus], "broken", f"{fragment:05d}.json")
            known = storage.read_json(broken) if storage.exists(broken) else {}
            unknown = [key for key in lacking if key not in known]
            if unknown:
                raise DataError(f"{url} has no embedding of the sample {unknown[0]}: embed this corpus again.")
        return found


def _read(url: str, columns: list[str]) -> pa.Table:
    fs, path = storage.open_fs(url)
    try:
        with fs.open(path, "rb") as raw:
            return pq.read_table(raw, columns=columns)
    except FileNotFoundError as error:
        raise DataError(f"{url} does not exist: `clew embed` the corpus that is trained on.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{url} is not a readable parquet file: {error}.") from error


def open_stored(name: str, field: str, folders: Sequence[str], corpora: Sequence[Corpus], teacher: str) -> StoredView:
    """Stored embeddings of a field for the view `name`, checked against the corpora.

    Args:
        name: of the view in the batch.
        field: of the samples that was embedded.
        folders: what `clew embed` wrote of each corpus.
        corpora: of the run.
        teacher: whose they are, for errors.

    Raises:
        ConfigError: folders that do not fit the corpora or each other, or lack the field.
    """
    if len(folders) != len(corpora):
        raise ConfigError(
            f"teachers.{teacher}.embeddings names {len(folders)} folders, but the run has {len(corpora)} corpora: give "
            "one for each, in their order."
        )
    column, widths = f"{field}_embedding", set()
    for folder, corpus in zip(folders, corpora, strict=True):
        files = set(storage.list_files(folder, ".parquet"))
        wanted = [f"{number:05d}.parquet" for number, each in enumerate(corpus.fragments) if each.samples]
        missing = [file for file in wanted if file not in files]
        if missing:
            raise ConfigError(f"teachers.{teacher}: {folder} has no {missing[0]}: `clew embed` all of {corpus.root}.")
        fs, path = storage.open_fs(storage.join(folder, wanted[0]))
        with fs.open(path, "rb") as raw:
            schema = pq.read_schema(raw)
        if column not in schema.names:
            raise ConfigError(f"teachers.{teacher}: {folder} has no column {column}; it has {', '.join(schema.names)}.")
        widths.add(schema.field(column).type.list_size)
    if len(widths) != 1:
        raise ConfigError(f"teachers.{teacher}: the embeddings of the corpora have different dimensions.")
    return StoredView(name, column, folders, widths.pop())
