"""Tiny corpora with embeddings, as a stage `embedding` would have written them: no model is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cl.corpus import Corpus, open_corpus
from pipelines.stages.base import vector_array
from tests.curation_corpora import text_corpus


def vector_corpus(
    root: Path,
    vectors: Mapping[str, np.ndarray],
    cuts: Sequence[int] = (),
    ids: Sequence[str] | None = None,
    texts: Sequence[tuple[str, str]] | None = None,
    **columns: Sequence[Any],
) -> Corpus:
    """A text corpus with columns: vectors [n, D] in float16, and plain ones; cut into fragments at `cuts`.

    The ids of the rows do not depend on the cuts; by default they are those of `row_id`.
    """
    count = len(next(iter([*vectors.values(), *columns.values()])))
    texts = texts or [(f"anchor {row}", f"positive {row}") for row in range(count)]
    ids = ids or [row_id(row) for row in range(count)]
    bounds = list(zip([0, *cuts], [*cuts, count], strict=True))
    text_corpus(root, [texts[start:end] for start, end in bounds])
    for number, (start, end) in enumerate(bounds):
        path = root / "samples" / f"{number:05d}.parquet"
        table = pq.read_table(path).drop_columns(["id", "key"])
        keys = [str(row) for row in range(start, end)]
        table = table.append_column("id", pa.array(ids[start:end], pa.string()))
        table = table.append_column("key", pa.array(keys, pa.string()))
        for name, points in vectors.items():
            table = table.append_column(name, vector_array(points[start:end]))
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values).slice(start, end - start))
        pq.write_table(table, path)
    return open_corpus(str(root))


def row_id(row: int) -> str:
    """32 hex digits, in no order."""
    return f"{(row + 1) * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128):032x}"


def unit_points(rng: np.random.Generator, count: int, width: int, centres: int, spread: float) -> np.ndarray:
    """float32 [count, width] of length 1 around random centres, as float16 holds them."""
    middle = rng.normal(size=(centres, width))
    points = middle[rng.integers(centres, size=count)] + spread * rng.normal(size=(count, width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
