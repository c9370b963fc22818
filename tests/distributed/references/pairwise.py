"""References of the pairwise objectives: InfoNCE and its nearest kin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests.distributed.references.batch import Batch, Reference


def infonce(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Radford et al. 2021, fig. 3: cross-entropy over rows and over columns, halved; or one direction."""
    first, second = batch.views.values()
    scores = parameters["temperature.log_scale"].exp() * first @ second.T
    candidates = scores.masked_fill(batch.excluded, -torch.inf)
    rows = candidates.logsumexp(1) - scores.diagonal()
    columns = candidates.logsumexp(0) - scores.diagonal()
    share = {"both": 0.5, "forward": 1.0, "backward": 0.0}[settings.get("direction", "both")]
    return batch.mean(share * rows) + batch.mean((1 - share) * columns)


def siglip(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Zhai et al. 2023, algorithm 1: -sum over all pairs of log sigmoid(z (t <x, y> + b)), over the batch size."""
    first, second = batch.views.values()
    logits = parameters["temperature.log_scale"].exp() * first @ second.T + parameters["bias"]
    z = 2 * batch.own.double() - 1
    return batch.mean(-logsigmoid(z * logits).masked_fill(batch.excluded, 0).sum(1))


def dcl(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Yeh et al. 2022, eq. 6: the sum over negatives alone; samples without negatives take no part in the mean."""
    views = list(batch.views.values())
    scale = parameters["temperature.log_scale"].exp()
    loss = torch.zeros((), dtype=torch.float64)
    directions = [views, views[::-1]] if settings.get("direction", "both") == "both" else [views]
    for anchor, other in directions:
        scores = [scale * anchor @ view.T for view in ((other, anchor) if settings.get("same_side") else (other,))]
        rest = torch.cat([each.masked_fill(batch.not_negative, -torch.inf) for each in scores], 1).logsumexp(1)
        some = rest > -torch.inf
        loss = loss + batch.mean(rest.where(some, 0) - scores[0].diagonal(), some) / len(directions)
    return loss


def ntxent(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Chen et al. 2020, eq. 1, on the 2N embeddings of both views: cross-entropy over all but the anchor itself."""
    count = len(batch.weight)
    both = torch.cat(list(batch.views.values()))
    scores = parameters["temperature.log_scale"].exp() * both @ both.T
    itself = torch.eye(2 * count, dtype=torch.bool)
    positive = itself.roll(count, 1)
    masked = (batch.weight == 0).repeat(2)
    excluded = batch.same.repeat(2, 2) & ~positive | itself | masked[None] | masked[:, None]
    terms = scores.masked_fill(excluded, -torch.inf).logsumexp(1) - scores[positive]
    return batch.mean((terms[:count] + terms[count:]) / 2)


REFERENCES: dict[str, Reference] = {
    "infonce": Reference(infonce, [{}, {"direction": "forward"}, {"direction": "backward"}]),
    "dcl": Reference(dcl, [{}, {"direction": "forward"}, {"same_side": True}]),
    "ntxent": Reference(ntxent),
    "siglip": Reference(siglip),
}
