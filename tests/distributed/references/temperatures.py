"""References of the objectives whose temperature is more than one number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.distributed.references.batch import Batch, Reference


def per_side(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """CLIP's two cross-entropies, each with its own temperature."""
    first, second = batch.views.values()
    scores = first @ second.T
    by_row = parameters["temperature.log_scale"].exp() * scores
    scale = 1 / settings["second_temperature"]["end"] if "second_temperature" in settings else None
    if scale is None:
        by_column = parameters["second.log_scale"].exp() * scores
    else:  # a ramp: a cosine from start to end over the run, not learnt
        start, end = settings["second_temperature"]["start"], settings["second_temperature"]["end"]
        part = (1 - torch.cos(torch.tensor(torch.pi * batch.clock.step / batch.clock.total, dtype=torch.float64))) / 2
        by_column = scores / (start + (end - start) * part)
    rows = by_row.masked_fill(batch.excluded, -torch.inf).logsumexp(1) - by_row.diagonal()
    columns = by_column.masked_fill(batch.excluded, -torch.inf).logsumexp(0) - by_column.diagonal()
    return batch.mean((rows + columns) / 2)


def per_sample(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Qiu et al. 2024, over both sides' anchors."""
    first, second = batch.views.values()
    scores = first @ second.T
    losses = torch.zeros(len(batch), dtype=torch.float64)
    for side, (view, matrix) in enumerate(((first, scores), (second, scores.T))):
        logit = view @ parameters[f"predict.{side}.weight"][0] + parameters[f"predict.{side}.bias"]
        tau = settings["least"] + (settings["greatest"] - settings["least"]) * logit.sigmoid()
        gaps = (matrix - matrix.diagonal()[:, None]) / tau[:, None]
        losses = losses + (gaps.masked_fill(batch.excluded, -torch.inf).logsumexp(1) + settings["rho"] * tau) / 2
    return batch.mean(losses)


RAMP = {"start": 0.3, "end": 0.1, "shape": "cosine"}
REFERENCES: dict[str, Reference] = {
    "infonce-per-side": Reference(per_side, [{}, {"second_temperature": RAMP}]),
    "infonce-per-sample": Reference(per_sample, [{"least": 0.05, "greatest": 0.5, "rho": 2.0}]),
}
