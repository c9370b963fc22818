"""How likely a sample is clean, from a mixture of two normal distributions over a loss or a score.

Samples with wrong labels or captions are learned later: their losses form a second, higher mode. Arazo et al. 2019,
"Unsupervised Label Noise Modeling and Loss Correction", fit a mixture to the losses; Li et al. 2020, "DivideMix", and
Huang et al. 2021 (noisy correspondence of image-text pairs), fit two Gaussians by EM and take

    w_i = p(clean component | loss_i)

The mixture is fitted to a histogram of `BINS` equal bins between the extremes, so it costs the same for any corpus. The
better component is the one with the lower mean of losses, or the higher of scores.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from cl.errors import DataError
from pipelines.keyed import id_words
from pipelines.shuffle import Routed, to_everyone
from pipelines.stages.base import Output, Rows, reasons
from pipelines.stages.keyed import Inbox, KeyedStage, Round, Streams
from pipelines.stages.registry import STAGES

BINS = 4096
ROUNDS = 1000  # of EM at most
ENOUGH = 1e-9  # gain in mean log-likelihood that ends it
EXTREMES = pa.schema([("low", pa.float64()), ("high", pa.float64())])
HISTOGRAM = pa.schema([("bin", pa.int64()), ("count", pa.int64())])
MIXTURE = pa.schema([("weight", pa.float64()), ("mean", pa.float64()), ("deviation", pa.float64())])


def log_densities(values: np.ndarray, mixture: np.ndarray) -> np.ndarray:
    """log(weight x density) of float64 [n] under each of [C, 3] (weight, mean, deviation), float64 [n, C]."""
    weight, mean, deviation = mixture.T
    with np.errstate(divide="ignore"):
        scale = np.log(weight) - np.log(deviation) - 0.5 * np.log(2 * np.pi)
    return np.asarray(scale - 0.5 * ((values[:, None] - mean) / deviation) ** 2)


def fit_two(values: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Two normal distributions by EM, float64 [2, 3] (weight, mean, deviation), the lower mean first.

    Args:
        values: float64 [n], all within [0, 1].
        count: int64 [n], how often each occurs.
    """
    total = count.sum()
    upper = values > (values * count).sum() / total
    share = np.stack([~upper, upper], 1).astype(np.float64)
    before = -np.inf
    mixture = np.zeros((2, 3))
    for _ in range(ROUNDS):
        part = share * count[:, None]
        weight = np.maximum(part.sum(0), 1e-12)
        mean = (part * values[:, None]).sum(0) / weight
        variance = (part * (values[:, None] - mean) ** 2).sum(0) / weight
        mixture = np.stack([weight / weight.sum(), mean, np.sqrt(variance + 1 / BINS**2)], 1)
        density = log_densities(values, mixture)
        whole = np.logaddexp(density[:, 0], density[:, 1])
        share = np.exp(density - whole[:, None])
        likelihood = float((whole * count).sum() / total)
        if likelihood - before < ENOUGH:
            break
        before = likelihood
    return mixture[np.argsort(mixture[:, 1], kind="stable")]


@STAGES.register(
    "noise_posterior",
    "Probability that a sample is clean, from a mixture of two normal distributions over losses or scores",
    "DivideMix: Learning with Noisy Labels as Semi-supervised Learning",
)
class NoisePosterior(KeyedStage):
    """A task holds 8 bytes a row of its partition."""

    drops: ClassVar[bool] = True
    frozen: ClassVar[Literal["statistics"]] = "statistics"
    sends: ClassVar[tuple[str, ...]] = ("values",)
    result: ClassVar[str] = "mixture"

    column: str = Field(description="numeric column: a loss of the corpus, or a score of an earlier stage")
    clean: Literal["low", "high"] = Field("low", description="which values clean samples have: losses low, scores high")
    min_probability: float | None = Field(
        None, ge=0, le=1, description="rows with less, or without a value, are dropped"
    )

    def needs(self, kind: Kind) -> list[str]:
        return [self.column]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field("clean_probability", pa.float32())]

    def partial(self, rows: Rows, partitions: int) -> Streams:
        values = rows.numbers(self.column)
        to = (id_words(rows.table["id"].to_pylist())[:, 0] % np.uint64(partitions)).astype(np.int64)
        good = np.isfinite(values)
        return {"values": Routed(pa.table({"value": values[good]}), to[good])}

    def rounds(self) -> list[Round]:
        return [
            Round("extremes", "partitions", ("values",), ("extremes",), self._extremes),
            Round("count", "partitions", ("values", "extremes"), ("histogram", "bounds"), self._count),
            Round("fit", "partitions", ("histogram", "bounds"), (self.result,), self._fit),
        ]

    def _extremes(self, inbox: Inbox) -> Streams:
        values = inbox.streams["values"]["value"].to_numpy()
        found = [[values.min()], [values.max()]] if len(values) else [[], []]
        return {"extremes": to_everyone(pa.table([pa.array(each, pa.float64()) for each in found], schema=EXTREMES))}

    def _count(self, inbox: Inbox) -> Streams:
        extremes = inbox.streams["extremes"]
        values = inbox.streams["values"]["value"].to_numpy()
        if not extremes.num_rows:
            raise DataError(f"Stage {self.name!r}: no row has a value in column {self.column!r}.")
        low, high = float(extremes["low"].to_numpy().min()), float(extremes["high"].to_numpy().max())
        place = np.minimum((values - low) / max(high - low, 1e-300) * BINS, BINS - 1).astype(np.int64)
        bins, count = np.unique(place, return_counts=True)
        bounds = pa.table([[low], [high]], schema=EXTREMES)
        return {
            "histogram": Routed(pa.table([bins, count], schema=HISTOGRAM), np.zeros(len(bins), np.int64)),
            "bounds": Routed(bounds.slice(0, 1 if inbox.task == 0 else 0), np.zeros(int(inbox.task == 0), np.int64)),
        }

    def _fit(self, inbox: Inbox) -> Streams:
        if inbox.task:
            return {self.result: to_everyone(MIXTURE.empty_table())}
        histogram, bounds = inbox.streams["histogram"], inbox.streams["bounds"]
        count = np.zeros(BINS, np.int64)
        np.add.at(count, histogram["bin"].to_numpy(), histogram["count"].to_numpy())
        low, high = (float(bounds[name].to_numpy()[0]) for name in EXTREMES.names)
        mixture = fit_two((np.arange(BINS) + 0.5) / BINS, count) * [1, high - low, high - low] + [0, low, 0]
        return {self.result: to_everyone(pa.table(list(mixture.T), schema=MIXTURE))}

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        values = rows.numbers(self.column)
        mixture = np.stack([reduced[name].to_numpy() for name in MIXTURE.names], 1)
        mixture[:, 2] = np.maximum(mixture[:, 2], 1e-300)  # all values equal
        known = np.isfinite(values)
        density = log_densities(np.where(known, values, 0), mixture)
        clean = density[:, 0 if self.clean == "low" else 1]
        probability = np.exp(clean - np.logaddexp(density[:, 0], density[:, 1]))
        columns = {"clean_probability": pa.array(probability.astype(np.float32), mask=~known)}
        noisy = np.zeros(len(rows), bool)
        if self.min_probability is not None:
            noisy = ~known | (probability.astype(np.float32) < np.float32(self.min_probability))
        return Output(columns, reasons(len(rows), {"noisy": noisy}))
