"""Keep rows by the value of any numeric column: within bounds, or exactly the best of those within, ties by id."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from cl.corpus import Kind
from pipelines.stages.base import Output, Rows, reasons
from pipelines.stages.keyed import Streams
from pipelines.stages.registry import STAGES
from pipelines.stages.selection import FLOAT64, Digits, Groups, Keys, Selection, ascending, keys_of, no_keys, selected


@STAGES.register("select", "Keep rows whose value of a column lies within bounds, or is among the highest or lowest")
class Select(Selection):
    """A task holds 32 bytes a row of its partition. A missing value is below every minimum and comes last."""

    drops: ClassVar[bool] = True

    column: str = Field(description="numeric column of the corpus or of an earlier stage")
    min: float | None = Field(None, description="rows with less, or without a value, are dropped")
    max: float | None = Field(None, description="rows with more are dropped")
    fraction: float | None = Field(None, gt=0, le=1, description="of the rows within the bounds that stay")
    target: int | None = Field(None, ge=1, description="rows that stay, in place of fraction")
    lowest: bool = Field(False, description="whether the lowest values are the best")

    @model_validator(mode="after")
    def _something(self) -> Select:
        if self.fraction is not None and self.target is not None:
            raise ValueError("give fraction or target, not both")
        if all(each is None for each in (self.min, self.max, self.fraction, self.target)):
            raise ValueError("give min, max, fraction or target: without any of them every row stays")
        return self

    def needs(self, kind: Kind) -> list[str]:
        return [self.column]

    def digits(self) -> Digits:
        return FLOAT64

    def _bounds(self, values: np.ndarray) -> dict[str, np.ndarray]:
        low = np.zeros(len(values), bool) if self.min is None else ~(values >= self.min)
        high = np.zeros(len(values), bool) if self.max is None else values > self.max
        return {"below_minimum": low, "above_maximum": high}

    def _keys(self, rows: Rows, values: np.ndarray) -> Keys:
        return keys_of(rows, np.zeros(len(rows), np.int64), ascending(values if self.lowest else -values))

    def partial(self, rows: Rows, partitions: int) -> Streams:
        if self.fraction is None and self.target is None:
            return self.send_keys(no_keys(), partitions)
        values = rows.numbers(self.column)
        out = np.logical_or.reduce(list(self._bounds(values).values()))
        return self.send_keys(self._keys(rows, values), partitions, ~out)

    def quotas(self, groups: Groups) -> np.ndarray:
        share = self.fraction or 1.0
        return np.array([self.target or max(round(share * size), 1) for size in groups.size.tolist()], np.int64)

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        values = rows.numbers(self.column)
        masks = self._bounds(values)
        if self.fraction is not None or self.target is not None:
            masks["outside_best"] = ~selected(self._keys(rows, values), reduced)
        return Output(drop=reasons(len(rows), masks))
