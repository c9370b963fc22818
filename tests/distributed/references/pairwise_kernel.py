"""References of pairwise objectives of distances, kernels and moments of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.distributed.references.batch import Batch, Reference
from tests.distributed.references.pairwise_softmax import own_view, scale_of

Parameters = Mapping[str, Tensor]
Settings = Mapping[str, Any]


def squared(first: Tensor, second: Tensor) -> Tensor:
    """[N, M]: |x_i - y_j|^2, difference by difference."""
    return (first[:, None] - second[None]).square().sum(-1)


def kernel_infonce(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Tan et al. 2024, on both views' embeddings: -log K(own) / sum of K over all but the anchor."""
    kernels = settings.get("kernels", [{"power": 1.0}, {"power": 0.5}])
    both = torch.cat(list(batch.views.values()))
    parts = both.chunk(len(kernels), 1) if settings.get("concatenate") else [both] * len(kernels)
    count = len(batch)
    itself = torch.eye(2 * count, dtype=torch.bool)
    value = torch.zeros(2 * count, 2 * count, dtype=torch.float64)
    for kernel, part in zip(kernels, parts, strict=True):
        distance = squared(part, part).masked_fill(itself, 1) ** kernel.get("power", 1.0)
        value = value + kernel.get("weight", 1.0) * (-distance / kernel.get("temperature", 1.0)).exp()
    positive = itself.roll(count, 1)
    masked = (batch.weight == 0).repeat(2)
    excluded = batch.same.repeat(2, 2) & ~positive | itself | masked[None] | masked[:, None]
    if not settings.get("same_side", True):
        side = torch.arange(2 * count) < count
        excluded = excluded | (side[:, None] == side)
    terms = value.masked_fill(excluded, 0).sum(1).log() - value[positive].log()
    return batch.mean((terms[:count] + terms[count:]) / 2)


def cacr(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Zheng et al. 2023: expected costs under the two conditional distributions, each view an anchor."""
    total = torch.zeros((), dtype=torch.float64)
    names = list(batch.views)
    for name in names:
        present = batch.present.get(name, torch.ones(len(batch), dtype=torch.bool))
        far, near, costs = [], [], []
        for other in names:
            if other == name:
                continue
            cost = squared(batch.views[name], batch.views[other])
            there = batch.present.get(other, torch.ones(len(batch), dtype=torch.bool))
            missing = ~(present[:, None] & there) | batch.masked
            far.append((settings.get("t_positive", 1.0) * cost).masked_fill(~batch.own | missing, -torch.inf))
            near.append((-settings.get("t_negative", 2.0) * cost).masked_fill(batch.not_negative | missing, -torch.inf))
            costs.append(cost)
        costs_all = torch.cat(costs, 1)
        pull = torch.cat(far, 1).softmax(1).nan_to_num()
        push = torch.cat(near, 1)
        push = push.where((push > -torch.inf).any(1, keepdim=True), -9e9).softmax(1).where(push > -torch.inf, 0)
        total = total + batch.mean(((pull - push) * costs_all).sum(1), present) / len(names)
    return total


def macl(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Huang et al. 2023, with the weight 1 / (1 - P) as a constant."""
    views = list(batch.views.values())
    own = (views[0] * views[1]).sum(1)
    alignment = batch.mean(own.detach())
    alpha, expected = settings.get("alpha", 0.5), settings.get("expected_alignment", 0.0)
    tau = (1 + alpha * (alignment - expected)) / scale_of(parameters, settings, 0.1)
    total = torch.zeros((), dtype=torch.float64)
    pairs = [views, views[::-1]] if settings.get("direction", "both") == "both" else [views]
    for anchor, other in pairs:
        negatives = [(anchor @ other.T / tau).masked_fill(batch.not_negative, -torch.inf)]
        if settings.get("same_side"):
            negatives.append(own_view(batch, anchor, 1 / tau))
        logits = torch.cat([own[:, None] / tau, *negatives], 1)
        some = (logits[:, 1:] > -torch.inf).any(1)
        chance = logits.softmax(1)
        rest = chance[:, 1:].sum(1)
        weight = 1 / rest.where(some, 1).detach()
        total = total + batch.mean(-weight * chance[:, 0].log(), some) / len(pairs)
    return total


def cloob(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Fuerst et al. 2022: retrieve from each modality's memory, then InfoLOOB."""
    alive = batch.weight > 0
    x, y = batch.views.values()
    beta, scale = settings.get("beta", 8.0), scale_of(parameters, settings, 1 / 30)

    def retrieve(query: Tensor, memory: Tensor) -> Tensor:
        return normalize(torch.softmax(beta * query @ memory[alive].T, 1) @ memory[alive], dim=1)

    total = torch.zeros((), dtype=torch.float64)
    for p, q in ((retrieve(x, x), retrieve(y, x)), (retrieve(y, y), retrieve(x, y))):
        logits = scale * p @ q.T
        rest = logits.masked_fill(batch.not_negative, -torch.inf).logsumexp(1)
        some = rest > -torch.inf
        total = total + batch.mean(rest.where(some, 0) - logits.diagonal(), some)
    return total / scale if settings.get("times_temperature") else total


def potential(batch: Batch, view: Tensor, t: float) -> Tensor:
    """log of the mean over anchors of the mean over their negatives of exp(-t d^2)."""
    counts = ~batch.not_negative
    count = counts.sum(1)
    each = (-t * squared(view, view)).exp().masked_fill(~counts, 0).sum(1) / count.clamp_min(1)
    return batch.mean(each, count > 0).log() if (count > 0).any() else torch.zeros((), dtype=torch.float64)


def alignment_uniformity(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Wang and Isola 2020."""
    x, y = batch.views.values()
    align = batch.mean((x - y).norm(dim=1) ** settings.get("alpha", 2.0))
    t = settings.get("t", 2.0)
    uniform = (potential(batch, x, t) + potential(batch, y, t)) / 2
    return settings.get("align_weight", 1.0) * align + settings.get("uniform_weight", 1.0) * uniform


def decoupled_uniformity(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Dufumier et al. 2023."""
    centre = torch.stack(list(batch.views.values())).mean(0)
    if "label" in settings:
        alive = batch.weight > 0
        label = batch.labels[settings["label"]].view(len(batch), -1)[alive]
        kernel = (-squared(label, label) / (2 * settings.get("bandwidth", 1.0) ** 2)).exp()
        n = len(label)
        alpha = torch.linalg.inv(kernel + n * settings.get("ridge", 0.01) * torch.eye(n, dtype=torch.float64)) @ kernel
        smooth = torch.zeros_like(centre)
        smooth[alive] = alpha.T @ centre[alive]
        centre = smooth
    return potential(batch, centre, settings.get("t", 1.0))


def spectral(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """HaoChen et al. 2021, with embeddings of length sqrt(mu)."""
    x, y = (view * settings.get("mu", 1.0) ** 0.5 for view in batch.views.values())
    scores = x @ y.T
    counts = ~batch.not_negative
    count = counts.sum(1)
    push = (scores**2 * counts).sum(1) / count.clamp_min(1)
    return -2 * batch.mean(scores.diagonal()) + batch.mean(push, count > 0)


MIXTURE = [{"power": 1.0, "temperature": 0.5, "weight": 2.0}, {"power": 0.25, "temperature": 0.3}]
REFERENCES: dict[str, Reference] = {
    "kernel-infonce": Reference(
        kernel_infonce, [{}, {"kernels": MIXTURE, "same_side": False}, {"kernels": MIXTURE, "concatenate": True}]
    ),
    "cacr": Reference(cacr, [{}, {"t_positive": 3.0, "t_negative": 0.5}], views=("a", "b", "c"), missing=True),
    "macl": Reference(
        macl,
        [{}, {"same_side": True, "expected_alignment": 0.3}, {"direction": "forward", "learn_temperature": True}],
    ),
    "cloob": Reference(cloob, [{}, {"beta": 2.0, "times_temperature": True, "learn_temperature": True}]),
    "alignment-uniformity": Reference(alignment_uniformity, [{}, {"alpha": 1.0, "t": 3.0, "uniform_weight": 0.5}]),
    "decoupled-uniformity": Reference(
        decoupled_uniformity, [{}, {"label": "score"}, {"label": "vector", "t": 2.0, "ridge": 0.1}], tolerance=1e-8
    ),
    "spectral": Reference(spectral, [{}, {"mu": 3.0}]),
}
