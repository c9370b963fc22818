"""The distinct things of a corpus: each is embedded once and is one candidate, however many samples hold it.

Images are one item if their content hash is equal, texts if they are equal but for white space and case. A corpus
that pairs one image with five captions thus has one image, five texts and five pairs, and either side counts as
correct for the other: the usual protocol of COCO and Flickr30k.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from cl.corpus import VIEWS, Corpus, Kind
from cl.errors import DataError


@dataclass(frozen=True)
class Items:
    """The distinct things of one view, in the order in which they first occur.

    Attributes:
        row: [M] the sample (row of the light plane) in which each first occurs.
        of_sample: [N] the item of each sample.
        embeddings: [M, D] float32 of unit length; empty until embedded.
    """

    row: NDArray[np.int64]
    of_sample: NDArray[np.int64]
    embeddings: Tensor = field(default_factory=lambda: Tensor())

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Embedded:
    """A corpus as the metrics see it: light plane, distinct items by view, and the text encoder for prompts."""

    kind: Kind
    table: pa.Table  # [N] id, texts, meta and, for images, the places of their bytes
    views: dict[str, Items]
    encode_texts: Callable[[Sequence[str]], Tensor]  # [K] texts -> [K, D] float32 of unit length
    excluded: dict[str, int] = field(default_factory=dict)  # reason -> samples left out

    @property
    def samples(self) -> int:
        return len(self.table)

    def column(self, name: str) -> list[Any]:
        """One column of the light plane."""
        return self.table.column(name).to_pylist()

    def ids(self, view: str) -> list[str]:
        """Sample id of the first occurrence of each item of a view."""
        return self.table.column("id").take(self.views[view].row).to_pylist()

    def texts(self, view: str) -> list[str]:
        """The text of each item of a view; for images, the caption of their first sample."""
        column = {"image": "text"}.get(view, view)
        return self.table.column(column).take(self.views[view].row).to_pylist()

    def pairs(self, left: str, right: str) -> NDArray[np.int64]:
        """[P, 2] the distinct pairs (item of `left`, item of `right`) that samples hold."""
        both = np.stack([self.views[left].of_sample, self.views[right].of_sample], axis=1)
        return np.unique(both, axis=0)

    def without(self, bad: NDArray[np.bool_], reason: str) -> Embedded:
        """Leave out samples; items that lose all of theirs go too. Embeddings of the other items are kept."""
        keep = ~bad
        views = {}
        for name, items in self.views.items():
            used, first, of_sample = np.unique(items.of_sample[keep], return_index=True, return_inverse=True)
            embeddings = items.embeddings[used] if len(items.embeddings) else items.embeddings
            views[name] = Items(first.astype(np.int64), of_sample.astype(np.int64), embeddings)
        excluded = {**self.excluded, reason: self.excluded.get(reason, 0) + int(bad.sum())}
        return replace(self, table=self.table.filter(pa.array(keep)), views=views, excluded=excluded)


def _distinct(keys: Sequence[str]) -> Items:
    number: dict[str, int] = {}
    rows: list[int] = []
    of_sample = np.empty(len(keys), dtype=np.int64)
    for row, key in enumerate(keys):
        item = number.setdefault(key, len(number))
        if item == len(rows):
            rows.append(row)
        of_sample[row] = item
    return Items(np.array(rows, dtype=np.int64), of_sample)


def text_key(text: str) -> str:
    """Two texts with the same key are the same text."""
    return " ".join(text.split()).casefold()


def read_items(corpus: Corpus, encode_texts: Callable[[Sequence[str]], Tensor], limit: int | None = None) -> Embedded:
    """Read a corpus's light plane and find its distinct items; nothing is embedded yet.

    Args:
        corpus: raw or curated.
        encode_texts: see `Embedded`.
        limit: keep at most this many samples, those with the smallest ids (which are hashes).

    Raises:
        DataError: every sample has an empty text.
    """
    texts = [view for view, modality in VIEWS[corpus.kind].items() if modality == "text"]
    places = ["content", "shard", "offset", "length"] if corpus.kind == "image-text" else []
    table = corpus.read(["id", "meta", *texts, *places])
    if limit is not None and limit < len(table):
        chosen = np.argsort(np.array(table.column("id").to_pylist()))[:limit]
        table = table.take(np.sort(chosen))
    columns = {view: [text_key(text) for text in table.column(view).to_pylist()] for view in texts}
    views = {view: _distinct(keys) for view, keys in columns.items()}
    if corpus.kind == "image-text":
        views = {"image": _distinct(table.column("content").to_pylist()), **views}
    data = Embedded(corpus.kind, table, views, encode_texts)
    empty = np.array([not all(keys) for keys in zip(*columns.values(), strict=True)])
    if empty.all():
        raise DataError(f"Corpus {corpus.root} has no sample with a text that is not empty.")
    return data.without(empty, "empty text") if empty.any() else data


def meta_field(data: Embedded, name: str) -> list[str | None]:
    """One field of each sample's own JSON metadata as text; None where it is missing or not a single value."""
    values: list[str | None] = []
    for text in data.column("meta"):
        try:
            value: Any = json.loads(text) if text else None
        except json.JSONDecodeError:
            value = None
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        values.append(None if value is None or isinstance(value, (dict, list)) else str(value))
    return values
