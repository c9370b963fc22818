"""References of pairwise objectives that are a softmax over candidates, or nearly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.distributed.references.batch import Batch, Reference

Parameters = Mapping[str, Tensor]
Settings = Mapping[str, Any]


def scale_of(parameters: Parameters, settings: Settings, default: float = 0.07) -> Tensor:
    """1 / tau; a temperature that is not trained has the precision of float32."""
    if "temperature.log_scale" in parameters:
        return parameters["temperature.log_scale"].exp()
    return torch.tensor(-math.log(settings.get("temperature", default)), dtype=torch.float32).double().exp()


def own_view(batch: Batch, view: Tensor, scale: Tensor | float = 1) -> Tensor:
    """Scores [N, N] within one view, -inf where the other is no negative."""
    return (scale * view @ view.T).masked_fill(batch.not_negative, -torch.inf)


def mined(batch: Batch, anchors: Tensor, name: str = "negatives") -> tuple[Tensor, Tensor]:
    """Scores [N, M] of anchors and mined negatives, and which of them count."""
    more = batch.extra[name]
    alive = (batch.weight > 0)[:, None] & (batch.weight > 0)[more.owner]
    return anchors @ more.embeddings.T, alive & (batch.content[:, None] != more.content)


def gte(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Li et al. 2023: four sums in one logarithm."""
    first, second = batch.views.values()
    scale = scale_of(parameters, settings)
    across = scale * first @ second.T
    candidates = across.masked_fill(batch.excluded, -torch.inf)
    sums = [candidates, own_view(batch, first, scale), candidates.T, own_view(batch, second, scale)]
    if "extra" in settings:
        scores, counts = mined(batch, first)
        sums.append((scale * scores).masked_fill(~counts, -torch.inf))
    return batch.mean(torch.cat(sums, 1).logsumexp(1) - across.diagonal())


def simcse(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Gao et al. 2021: in-batch positives and mined negatives, the own ones with a weight."""
    first, second = batch.views.values()
    scale = scale_of(parameters, settings)
    across = first @ second.T
    terms = [(scale * across).exp().masked_fill(batch.excluded, 0)]
    if "extra" in settings:
        scores, counts = mined(batch, first)
        owned = batch.extra["negatives"].owner == torch.arange(len(batch))[:, None]
        weight = torch.where(owned, settings.get("own_negative_weight", 1.0), 1.0)
        terms.append((weight * (scale * scores).exp()).masked_fill(~counts, 0))
    return batch.mean(torch.cat(terms, 1).sum(1).log() - scale * across.diagonal())


def promcse(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Jiang et al. 2022: SimCSE and max(0, m - s(own) + max over the others)."""
    first, second = batch.views.values()
    across = first @ second.T
    others = [across.masked_fill(batch.not_negative, -torch.inf)]
    if "extra" in settings:
        scores, counts = mined(batch, first)
        others.append(scores.masked_fill(~counts, -torch.inf))
    hardest = torch.cat(others, 1).amax(1)
    some = hardest > -torch.inf
    hinge = (settings.get("margin", 0.2) - across.diagonal() + hardest.where(some, -9)).clamp_min(0)
    return simcse(batch, parameters, settings) + settings.get("hinge_weight", 10.0) * batch.mean(hinge)


def dclw(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Yeh et al. 2022: -w <z1, z2> / tau + log of the sum over negatives of both views, for each view."""
    views = list(batch.views.values())
    scale, sigma = scale_of(parameters, settings), settings.get("sigma", 0.5)
    own = (views[0] * views[1]).sum(1)
    terms = []
    for anchor, other in (views, views[::-1]):
        negatives = [(scale * anchor @ other.T).masked_fill(batch.not_negative, -torch.inf)]
        if settings.get("same_side", True):
            negatives.append(own_view(batch, anchor, scale))
        terms.append(torch.cat(negatives, 1).logsumexp(1))
    valid = (terms[0] > -torch.inf) & (batch.weight > 0)
    power = (own.detach() if settings.get("stop_weight", True) else own).div(sigma).exp()
    mean_power = batch.mean(power, valid)
    weight = 2 - power / (mean_power if valid.any() else 1)
    rest = ((terms[0] + terms[1]) / 2).where(valid, 0)
    return batch.mean(rest - weight * scale * own, valid)


def margin(batch: Batch, parameters: Parameters, settings: Settings, kind: str, size: float, both: bool) -> Tensor:
    """A margin on the own pair alone, in numerator and denominator."""
    views = list(batch.views.values())
    scale = scale_of(parameters, settings)
    kind, size = settings.get("kind", kind), settings.get("margin", size)
    cosine = (views[0] * views[1]).sum(1)
    theta = cosine.acos()
    if kind == "additive":
        own = cosine - size
    elif kind == "angular":
        own = torch.where(theta + size < math.pi, (theta + size).cos(), cosine - size * math.sin(size))
    else:
        k = (size * theta / math.pi).floor().detach()
        own = (-1.0) ** k * (size * theta).cos() - 2 * k
    total = torch.zeros((), dtype=torch.float64)
    pairs = [views, views[::-1]] if settings.get("direction", "both") == "both" else [views]
    for anchor, other in pairs:
        negatives = [(scale * anchor @ other.T).masked_fill(batch.not_negative, -torch.inf)]
        if settings.get("same_side", both):
            negatives.append(own_view(batch, anchor, scale))
        logits = torch.cat([scale * own[:, None], *negatives], 1)
        total = total - batch.mean(logits.log_softmax(1)[:, 0]) / len(pairs)
    return total


def adaptive_margin(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Gienapp et al. 2025: error of s_ii - s_ij against (1 + <c_i, c_j>) / 2, a mean over the negatives of i."""
    first, second = list(batch.views.values())
    own = (first * second).sum(1, keepdim=True)
    scores, documents, counts = [first @ second.T], [second @ second.T], [~batch.not_negative]
    if "extra" in settings:
        found, count = mined(batch, first)
        scores.append(found)
        documents.append(second @ batch.extra["negatives"].embeddings.T)
        counts.append(count)
    alike = torch.cat(documents, 1)
    if settings.get("stop_target"):
        alike = alike.detach()
    target = (1 + alike) / 2 if settings.get("target", "similarity") == "similarity" else (1 - alike) / 2
    miss = own - torch.cat(scores, 1) - target
    error = {"l2": miss**2, "l1": miss.abs(), "soft": (1 + (-miss).exp()).log()}[settings.get("error", "l2")]
    count = torch.cat(counts, 1).double()
    return batch.mean((error * count).sum(1) / count.sum(1).clamp_min(1), count.sum(1) > 0)


NEGATIVES = {"extra": ["negatives"]}
REFERENCES: dict[str, Reference] = {
    "gte": Reference(gte, [{}, NEGATIVES], extra=("negatives",)),
    "simcse": Reference(simcse, [{}, {**NEGATIVES, "own_negative_weight": 2.5}], extra=("negatives",)),
    "promcse": Reference(promcse, [{}, {**NEGATIVES, "margin": 0.7}], extra=("negatives",)),
    "dclw": Reference(dclw, [{}, {"stop_weight": False}, {"same_side": False, "sigma": 0.2}]),
    "additive-margin": Reference(
        partial(margin, kind="additive", size=0.3, both=False), [{}, {"direction": "forward", "margin": 0.1}]
    ),
    "angular-margin": Reference(
        partial(margin, kind="angular", size=math.radians(10), both=False), [{}, {"margin": 1.2}]
    ),
    "multiplicative-margin": Reference(
        partial(margin, kind="multiplicative", size=2.0, both=False), [{}, {"margin": 3.5, "same_side": True}]
    ),
    "ntxent-am": Reference(partial(margin, kind="additive", size=0.1, both=True), [{}, {"kind": "angular"}]),
    "adaptive-margin": Reference(
        adaptive_margin,
        [{}, {**NEGATIVES, "stop_target": True}, {"error": "l1", "target": "distance"}, {"error": "soft"}],
        extra=("negatives",),
    ),
}
