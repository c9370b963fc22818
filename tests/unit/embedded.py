"""Embedded corpora made in memory, for tests of metrics."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from cl.corpus import Kind
from cl.evaluation.items import Embedded, Items


def unit_rows(rng: np.random.Generator, rows: int, dim: int) -> Tensor:
    """Random unit vectors, float32 [rows, dim]."""
    return F.normalize(torch.from_numpy(rng.standard_normal((rows, dim))), dim=1).float()


def make_embedded(
    left: Tensor,
    right: Tensor,
    pairs: list[tuple[int, int]],
    kind: Kind = "image-text",
    meta: list[str | None] | None = None,
) -> Embedded:
    """A corpus with one sample for each pair (item of the left view, item of the right view)."""
    names = ("image", "text") if kind == "image-text" else ("anchor", "positive")
    sample = np.array(pairs)
    views = {}
    for side, (name, vectors) in enumerate(zip(names, (left, right), strict=True)):
        used, first, of_sample = np.unique(sample[:, side], return_index=True, return_inverse=True)
        assert len(used) == len(vectors), "every item must occur in a pair"
        views[name] = Items(first, of_sample, vectors)
    columns = {
        "id": [f"{row:032x}" for row in range(len(pairs))],
        "meta": pa.array(meta or [None] * len(pairs), type=pa.string()),
        "text": [f"text {right}" for _, right in pairs],
        "anchor": [f"anchor {left}" for left, _ in pairs],
        "positive": [f"positive {right}" for _, right in pairs],
    }
    return Embedded(kind, pa.table(columns), views, lambda texts: left[: len(texts)])
