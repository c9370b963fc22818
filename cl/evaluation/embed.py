"""Embed every distinct item of a corpus once, in batches, with images decoded ahead of the model by threads.

Needs no Ray: it runs wherever the model is, in a command, a training worker or a trial of a sweep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cl import storage
from cl.corpus import VIEWS, Corpus
from cl.errors import ConfigError, DataError
from cl.evaluation.items import Embedded, read_items

if TYPE_CHECKING:
    from cl.encoders import EncoderModel, Inputs

Place = tuple[str, int, int]  # shard, offset, length (bytes)
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Encoder:
    """A model with what feeds it: the only things evaluation knows about a checkpoint."""

    model: EncoderModel
    inputs: Inputs
    device: torch.device
    batch_size: int = 128  # items
    bf16: bool = False
    threads: int = 2  # read and decode ahead

    def encode(self, view: str, inputs: Any) -> Tensor:
        """Embed one batch of a view: [B, D] float32 of unit length, on the device."""
        moved = (
            {k: v.to(self.device) for k, v in inputs.items()} if isinstance(inputs, dict) else inputs.to(self.device)
        )
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            embedded = self.model.encode(view, moved)
        return F.normalize(embedded.float(), dim=1)

    def texts(self, view: str, texts: Sequence[str], advance: Advance = lambda count: None) -> Tensor:
        """Embed texts, those of similar length together (less padding). [K] -> [K, D]"""
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        parts = []
        for rows in _chunks(order, self.batch_size):
            parts.append(self.encode(view, self.inputs.texts(view, [texts[row] for row in rows])))
            advance(len(rows))
        embedded = torch.cat(parts)
        result = torch.empty_like(embedded)
        result[torch.tensor(order, device=embedded.device)] = embedded
        return result

    def images(
        self, view: str, corpus: Corpus, places: Sequence[Place], advance: Advance = lambda count: None
    ) -> tuple[Tensor, dict[int, str]]:
        """Embed images by the places of their bytes. [K] -> [K, D] and row -> reason for those that are broken.

        Raises:
            DataError: a shard is not there.
        """
        order = sorted(range(len(places)), key=lambda row: places[row])  # a shard is read front to back

        def load(rows: list[int]) -> tuple[list[int], Tensor, dict[int, str]]:
            failures: dict[int, str] = {}
            data = read_bytes(corpus, [places[row] for row in rows])
            return rows, self.inputs.images(view, data, failures=failures), failures

        result: Tensor | None = None
        broken: dict[int, str] = {}
        for rows, pixels, failures in _ahead(load, _chunks(order, self.batch_size), self.threads):
            embedded = self.encode(view, pixels)
            if result is None:
                result = torch.empty(len(places), embedded.shape[1], device=embedded.device)
            result[torch.tensor(rows, device=embedded.device)] = embedded
            broken.update({rows[place]: reason for place, reason in failures.items()})
            advance(len(rows))
        assert result is not None, "a corpus has at least one sample"
        return result, broken


def _chunks(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _ahead(load: Callable[[list[int]], Any], batches: Iterator[list[int]], threads: int) -> Iterator[Any]:
    """Run `load` in threads, at most `threads` + 1 batches ahead; results come in order."""
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for rows in batches:
                waiting.append(pool.submit(load, rows))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def read_bytes(corpus: Corpus, places: Sequence[Place]) -> list[bytes]:
    """The bytes of images. A range beyond the end of its shard gives fewer bytes (which then do not decode).

    Raises:
        DataError: a shard is not there or cannot be read.
    """
    found: list[bytes] = [b""] * len(places)
    by_shard: dict[str, list[int]] = {}
    for row, (shard, _, _) in enumerate(places):
        by_shard.setdefault(shard, []).append(row)
    for shard, rows in by_shard.items():
        url = corpus.shard_url(shard)
        fs, path = storage.open_fs(url)
        try:
            if isinstance(fs, LocalFileSystem):
                with open(path, "rb") as file:
                    for row in rows:
                        file.seek(places[row][1])
                        found[row] = file.read(places[row][2])
            else:
                starts = [places[row][1] for row in rows]
                ends = [places[row][1] + places[row][2] for row in rows]
                for row, data in zip(rows, fs.cat_ranges([path] * len(rows), starts, ends), strict=True):
                    found[row] = data
        except FileNotFoundError as error:
            raise DataError(f"Shard {url} of corpus {corpus.root} does not exist.") from error
        except OSError as error:
            raise DataError(f"Shard {url} cannot be read: {error.strerror or error}.") from error
    return found


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is none that torch knows: use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this machine has no GPU that torch can use; use auto or cpu.")
    return device


def items_to_embed(data: Embedded) -> int:
    """How many distinct images and texts a corpus has."""
    return sum(len(items) for items in data.views.values())


def embed_corpus(
    corpus: Corpus, encoder: Encoder, limit: int | None = None, started: Callable[[int], Advance] | None = None
) -> Embedded:
    """Read a corpus and embed its distinct items. Samples whose image cannot be decoded are excluded and counted.

    Args:
        corpus: raw or curated.
        encoder: the model and what feeds it.
        limit: at most this many samples, those with the smallest ids.
        started: called with the number of items when it is known; returns what to call with each batch's count.

    Raises:
        DataError: nothing is left to evaluate, a shard is missing, or the model lacks a view of this corpus.
    """
    modalities = VIEWS[corpus.kind]
    missing = [view for view in modalities if view not in encoder.inputs.views]
    if missing:
        raise DataError(
            f"Corpus {corpus.root} holds {corpus.kind} pairs, but the checkpoint's model has no view {missing[0]!r}; "
            f"it has {', '.join(encoder.inputs.views)}."
        )
    text_view = next(view for view, modality in modalities.items() if modality == "text")
    data = read_items(corpus, lambda texts: encoder.texts(text_view, texts), limit)
    advance: Advance = started(items_to_embed(data)) if started else lambda count: None
    views, bad = {}, np.zeros(data.samples, dtype=bool)
    for view, items in data.views.items():
        if modalities[view] == "text":
            embeddings = encoder.texts(view, data.texts(view), advance)
        else:
            embeddings, broken = encoder.images(view, corpus, _places(data, items.row), advance)
            bad |= np.isin(items.of_sample, list(broken))
        views[view] = replace(items, embeddings=embeddings)
    data = replace(data, views=views)
    if bad.all():
        raise DataError(f"Corpus {corpus.root} has no image that can be decoded.")
    return data.without(bad, "broken image") if bad.any() else data


def _places(data: Embedded, rows: NDArray[np.int64]) -> list[Place]:
    table = data.table.select(["shard", "offset", "length"]).take(rows)
    return list(zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True))
