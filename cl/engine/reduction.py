"""Reductions: what a rule makes of one tile, along its rows or its columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Over = Literal["candidates", "negatives", "all"]


@dataclass(frozen=True)
class Reduction:
    """A value per tile entry [R, C], reduced along rows (to [R]) or columns (to [C]).

    `over` says which entries count: `candidates` (valid samples, other than repetitions of the row's own content),
    `negatives` (candidates without the row's own positives) or `all` (every valid pair of samples).
    """

    values: Tensor
    over: Over = "candidates"
    mask: Tensor | None = None  # [R, C] bool, narrows `over` further
    axis: Literal["row", "column"] = "row"
    kind: Literal["lse", "sum", "mean", "top"] = "lse"
    payload: Tensor | None = None  # mean: the values whose softmax-weighted mean is taken
    k: int = 0  # top: how many


Reductions = Mapping[str, Reduction | Sequence[Reduction]]


def row_lse(values: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """log sum_j exp values_ij for each row; -inf where nothing counts."""
    return Reduction(values, over, mask)


def column_lse(values: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """log sum_i exp values_ij for each column."""
    return Reduction(values, over, mask, "column")


def row_sum(values: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """sum_j values_ij for each row; 0 where nothing counts."""
    return Reduction(values, over, mask, "row", "sum")


def column_sum(values: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """sum_i values_ij for each column."""
    return Reduction(values, over, mask, "column", "sum")


def row_mean(logits: Tensor, payload: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """sum_j softmax_j(logits)_ij payload_ij for each row; 0 where nothing counts."""
    return Reduction(logits, over, mask, "row", "mean", payload)


def column_mean(logits: Tensor, payload: Tensor, over: Over = "candidates", mask: Tensor | None = None) -> Reduction:
    """sum_i softmax_i(logits)_ij payload_ij for each column."""
    return Reduction(logits, over, mask, "column", "mean", payload)


def row_top(values: Tensor, k: int, over: Over = "negatives", mask: Tensor | None = None) -> Reduction:
    """The k largest values of each row [R, k], descending, -inf where there are fewer; ties go to the first column.

    Their places are the statistic NAME.index, [R, k] int64: the number of the column among all columns of its view,
    in the order of the samples (after those of the views that the rule compares with the row's before it); -1 for none.
    """
    return Reduction(values, over, mask, "row", "top", k=k)


def column_top(values: Tensor, k: int, over: Over = "negatives", mask: Tensor | None = None) -> Reduction:
    """The k largest values of each column [C, k]; as `row_top`, with rows for columns."""
    return Reduction(values, over, mask, "column", "top", k=k)
