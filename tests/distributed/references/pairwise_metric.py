"""References of pairwise objectives with margins of distances, and of those that predict or shift embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.distributed.references.batch import Batch, Reference
from tests.distributed.references.pairwise import ntxent
from tests.distributed.references.pairwise_kernel import squared
from tests.distributed.references.pairwise_softmax import mined, scale_of

Parameters = Mapping[str, Tensor]
Settings = Mapping[str, Any]


def triplet(batch: Batch, parameters: Parameters, settings: Settings, mining: str, kind: str, margin: float) -> Tensor:
    """Hermans et al. 2017, and Schroff et al. 2015, anchor by anchor."""
    kind, margin = settings.get("distance", kind), settings.get("margin", margin)

    def measure(first: Tensor, second: Tensor) -> Tensor:
        if kind == "cosine":
            return 1 - first @ second.T
        distance = squared(first, second)
        return distance if kind == "squared" else distance.where(distance > 0, 1).sqrt()  # 0: an anchor and itself

    def hinge(cost: Tensor) -> Tensor:
        return (1 + cost.exp()).log() if settings.get("soft") else cost.clamp_min(0)

    views = list(batch.views.values())
    pairs = [views, views[::-1]] if settings.get("direction", "both") == "both" else [views]
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for number, (anchor, other) in enumerate(pairs):
        distance, counts = measure(anchor, other), ~batch.not_negative
        own = distance.diagonal()
        if settings.get("same_side"):
            distance = torch.cat([distance, measure(anchor, anchor)], 1)
            counts = torch.cat([counts, counts], 1)
        if "extra" in settings and number == 0:
            distance = torch.cat([distance, measure(anchor, batch.extra["negatives"].embeddings)], 1)
            counts = torch.cat([counts, mined(batch, anchor)[1]], 1)
        values, valid = torch.zeros(len(batch), dtype=torch.float64), torch.zeros(len(batch), dtype=torch.bool)
        for i in range(len(batch)):
            negatives = distance[i, counts[i]]
            if not len(negatives):
                continue
            valid[i] = True
            if mining == "all":
                cost = margin + own[i] - negatives
                values[i] = hinge(cost).sum()
                count += float(batch.weight[i]) * (len(cost) if settings.get("soft") else int((cost > 0).sum()))
                continue
            beyond = negatives[negatives > own[i]]
            farther = beyond.min() if len(beyond) else negatives.max()
            chosen = negatives.min() if mining == "hard" else farther
            values[i] = hinge(margin + own[i] - chosen)
        if mining == "all":
            total = total + (batch.weight * values).sum()
        else:
            total = total + batch.mean(values, valid) / len(pairs)
    return total / max(count, 1e-30) if mining == "all" else total


def hinge_ranking(batch: Batch, parameters: Parameters, settings: Settings, negatives: str) -> Tensor:
    """Kiros et al. 2014 (sum), and Faghri et al. 2018 (max)."""
    x, y = batch.views.values()
    scores = x @ y.T
    own, margin = scores.diagonal(), settings.get("margin", 0.2)
    negatives = settings.get("negatives", negatives)
    total = torch.zeros((), dtype=torch.float64)
    for number, matrix in enumerate((scores, scores.T)):
        cost, counts = margin - own[:, None] + matrix, ~batch.not_negative
        if "extra" in settings and number == 0:
            more, count = mined(batch, x)
            cost, counts = torch.cat([cost, margin - own[:, None] + more], 1), torch.cat([counts, count], 1)
        cost = cost.clamp_min(0) * counts
        value = cost.amax(1) if negatives == "hardest" else cost.sum(1)
        total = total + batch.mean(value / counts.sum(1).clamp_min(1) if negatives == "mean" else value)
    return total


def cpc(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """van den Oord et al. 2018: cross-entropy of z_k^T W_k c for each horizon."""
    names = list(batch.views)
    scale = scale_of(parameters, settings)
    total = torch.zeros((), dtype=torch.float64)
    for k, name in enumerate(names[1:]):
        present = batch.present.get(name, torch.ones(len(batch), dtype=torch.bool))
        scores = scale * (batch.views[names[0]] @ parameters["predictors"][k].T) @ batch.views[name].T
        missing = batch.excluded | ~(present[:, None] & present)
        missing = missing & ~(batch.own & (batch.weight > 0))
        lse = scores.masked_fill(missing | ~present, -torch.inf).logsumexp(1)
        loss = lse.where(present, 0) - scores.diagonal()
        total = total + batch.mean(loss, present) / (len(names) - 1)
    return total


def brownian_bridge(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Wang et al. 2022."""
    start, middle, end = batch.views.values()
    t, last = batch.labels["time"].double()[:, None].unbind(2)
    bridge = (1 - t / last) * start + t / last * end
    density = -squared(bridge, middle) / (2 * t * (last - t) / last)
    return batch.mean(density.masked_fill(batch.excluded, -torch.inf).logsumexp(1) - density.diagonal())


def mean_shifted(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Reiss and Hoshen 2023, around the mean of the first batches."""
    x, y = batch.views.values()
    memory = batch.memory.setdefault("state", {"centre": torch.zeros(x.shape[1]).double(), "seen": torch.tensor(0)})
    if memory["seen"] < settings.get("centre_steps", 100) and (batch.weight > 0).any():
        mean = (batch.weight[:, None] * (x + y) / 2).sum(0).detach() / batch.weight.sum()
        memory["centre"] = (memory["seen"] * memory["centre"] + mean) / (memory["seen"] + 1)
        memory["seen"] = memory["seen"] + 1
    centre = memory["centre"]
    weight = settings.get("angular_weight", 0.0)
    centre = normalize(centre, dim=0) if weight else centre
    turned = Batch(
        {"a": normalize(x - centre, dim=1), "b": normalize(y - centre, dim=1)}, batch.weight, batch.content, batch.ids
    )
    scale = {"temperature.log_scale": scale_of(parameters, settings, 0.25).log()}
    spread = ((x - centre) ** 2).sum(1) + ((y - centre) ** 2).sum(1)
    return ntxent(turned, scale, settings) + weight * batch.mean(spread)


MINED = {"extra": ["negatives"]}
REFERENCES: dict[str, Reference] = {
    "triplet": Reference(
        partial(triplet, mining="hard", kind="euclidean", margin=0.3),
        [
            {"distance": "cosine", "margin": 0.2},
            {**MINED, "soft": True},
            {"direction": "forward", "distance": "squared"},
        ],
        extra=("negatives",),
    ),
    "triplet-semi-hard": Reference(
        partial(triplet, mining="semi-hard", kind="squared", margin=0.2),
        [{}, {**MINED, "distance": "euclidean", "margin": 1.0, "same_side": True}],
        extra=("negatives",),
    ),
    "triplet-all": Reference(
        partial(triplet, mining="all", kind="euclidean", margin=0.3),
        [{}, {**MINED, "margin": 0.1}, {"soft": True, "direction": "forward", "same_side": True}],
        extra=("negatives",),
    ),
    "hinge": Reference(
        partial(hinge_ranking, negatives="sum"),
        [{}, {**MINED, "negatives": "mean", "margin": 0.5}],
        extra=("negatives",),
    ),
    "vse++": Reference(partial(hinge_ranking, negatives="hardest"), [{}, MINED], extra=("negatives",)),
    "cpc": Reference(cpc, [{"horizons": 2}], views=("a", "b", "c"), missing=True),
    "brownian-bridge": Reference(brownian_bridge, views=("a", "b", "c")),
    "mean-shifted": Reference(mean_shifted, [{}, {"angular_weight": 0.5, "centre_steps": 2}]),
}
