"""References of objectives with graded and soft targets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine import randomness
from tests.distributed.references.batch import Batch, Reference
from tests.distributed.references.pairwise_kernel import squared
from tests.distributed.references.pairwise_softmax import scale_of

Parameters = Mapping[str, Tensor]
Settings = Mapping[str, Any]


def soft(batch: Batch, logits: list[Tensor], weights: list[Tensor], settings: Settings) -> Tensor:
    """Cross-entropy of weights and logits, each [N, M] for the anchors of one view; own pairs stand first."""
    total = torch.zeros((), dtype=torch.float64)
    for score, weight in zip(logits, weights, strict=True):
        counts = score > -torch.inf
        weight = weight * counts
        mass = weight.sum(1, keepdim=True)
        valid = mass[:, 0] > 0
        target = weight / mass.where(mass > 0, 1)
        own = settings.get("own_share", 0.0)
        target = (1 - own) * target + own * torch.eye(*target.shape, dtype=torch.float64)
        uniform = settings.get("uniform", 0.0)
        target = (1 - uniform) * target + uniform * counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
        log_q = score.where(counts, -torch.inf).log_softmax(1).where(counts, 0)
        total = total - batch.mean((target * log_q).sum(1), valid) / len(logits)
    return total


def two_sided(batch: Batch, affinity: Tensor, parameters: Parameters, settings: Settings) -> Tensor:
    """`soft` with one affinity [N, N] for both directions and cosines for logits."""
    scale = scale_of(parameters, settings)
    return soft_of(batch, lambda x, y: scale * x @ y.T, [affinity, affinity.T], settings)


def soft_of(
    batch: Batch, score: Any, affinities: list[Tensor], settings: Settings, within: Tensor | None = None
) -> Tensor:
    """`soft` with any score of two views, the affinity of each direction, and that of samples in the same view."""
    views = list(batch.views.values())[:2]
    logits, weights = [], []
    directions = [(0, 1), (1, 0)] if settings.get("direction", "both") == "both" else [(0, 1)]
    for first, second in directions:
        parts = [score(views[first], views[second]).masked_fill(batch.excluded, -torch.inf)]
        known = [affinities[first]]
        if settings.get("same_side"):
            parts.append(score(views[first], views[first]).masked_fill(batch.not_negative, -torch.inf))
            known.append(affinities[0] if within is None else within)
        logits.append(torch.cat(parts, 1))
        weights.append(torch.cat(known, 1))
    return soft(batch, logits, weights, settings)


def soft_targets(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Brannon et al. 2023: targets (1 - own) T / sum T + own I."""
    return two_sided(batch, batch.targets["soft"], parameters, settings)


def soft_labels(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Burdisso et al. 2024."""
    label = normalize(batch.labels["vector"], dim=1)
    return two_sided(batch, (label @ label.T / settings.get("label_temperature", 0.35)).exp(), parameters, settings)


def y_aware(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Dufumier et al. 2021."""
    label = batch.labels[settings.get("label", "score")].view(len(batch), -1)
    affinity = (-squared(label, label) / (2 * settings.get("sigma", 1.0) ** 2)).exp()
    return two_sided(batch, affinity, parameters, settings)


def listnet(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Cao et al. 2007."""
    return two_sided(
        batch, (batch.targets["soft"] / settings.get("target_temperature", 1.0)).exp(), parameters, settings
    )


def cwcl(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Srinivasa et al. 2023: weighted one way, plain the other way."""
    first, second = list(batch.views.values())[:2]
    teacher = batch.views[settings["teacher"]] if "teacher" in settings else first.detach()
    logits = (scale_of(parameters, settings) * first @ second.T).masked_fill(batch.excluded, -torch.inf)
    weight = (0.5 + teacher @ teacher.T / 2) * ~batch.excluded
    log_p = logits.log_softmax(1).masked_fill(batch.excluded, 0)
    mass = weight.sum(1)
    loss = batch.mean(-(weight * log_p).sum(1) / mass.where(mass > 0, 1))
    if settings.get("direction", "both") == "forward":
        return loss
    return (loss + batch.mean(-logits.T.log_softmax(1).diagonal())) / 2


def gcl(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Zhu et al. 2024: each pair's cross-entropies times the weight of its relevance."""
    first, second = batch.views.values()
    logits = (scale_of(parameters, settings) * first @ second.T).masked_fill(batch.excluded, -torch.inf)
    both = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) / 2
    y = batch.labels[settings.get("label", "score")].double()
    kind = settings.get("weight", "linear")
    weight = {
        "linear": y.clamp_min(0),
        "constant": torch.ones_like(y),
        "reciprocal": 1 / y.clamp_min(1),
        "inverse-log": math.log(2) / (1 + y.clamp_min(1)).log(),
    }[kind]
    loss = batch.mean(weight * both)
    return loss / batch.mean(weight) if settings.get("normalise") else loss


def listmle(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Xia et al. 2008 and 2009: the Plackett-Luce likelihood of the first k places, row by row."""
    first, second = batch.views.values()
    logits = scale_of(parameters, settings) * first @ second.T
    values = torch.zeros(len(batch), dtype=torch.float64)
    for i in range(len(batch)):
        listed = [j for j in range(len(batch)) if not batch.excluded[i, j]]
        listed.sort(key=lambda j: -float(batch.targets["soft"][i, j]))  # stable: ties keep their order
        for place in range(min(settings.get("k", 5), len(listed))):
            values[i] = values[i] - logits[i, listed[place:]].log_softmax(0)[0]
    return batch.mean(values)


def wasserstein(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Yu et al. 2019 on a line: between two neighbouring relevances flows what one side has too much of."""
    first, second = batch.views.values()
    logits, losses = scale_of(parameters, settings) * first @ second.T, []
    for i in range(len(batch)):
        kept = ~batch.excluded[i]
        if not kept.any():
            losses.append(torch.zeros((), dtype=torch.float64))
            continue
        y = batch.targets["soft"][i, kept]
        extra = logits[i, kept].softmax(0) - (y / settings.get("target_temperature", 1.0)).softmax(0)
        levels = sorted(float(each) for each in y)
        flows = [extra[y <= low].sum().abs() * (high - low) for low, high in pairwise(levels)]
        losses.append(sum(flows, torch.zeros((), dtype=torch.float64)))
    return batch.mean(torch.stack(losses))


def wasserstein_gaussian(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Esfandiarpoor et al. 2025: the distance between Gaussians; tr (S T)^(1/2) is a sum of singular values."""
    first, second = batch.views.values()
    relevance = batch.targets["soft"] / settings.get("target_temperature", 1.0)
    alive = batch.weight > 0
    share = batch.weight[alive] / batch.weight.sum()
    rows = []
    for logits in (scale_of(parameters, settings) * first @ second.T, relevance):
        p = logits.masked_fill(batch.excluded, -torch.inf)[alive].softmax(1)
        rows.append((share @ p, share.sqrt()[:, None] * (p - share @ p)))
    (m, x), (n, y) = rows
    covariances = (x.T @ x).trace() + (y.T @ y).trace() - 2 * torch.linalg.matrix_norm(x @ y.T, ord="nuc")
    return (m - n).square().sum() + covariances


def supremix(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Wu et al. 2023: mixtures one by one; where the lots of the mixtures fall is the counters' business."""
    names, y, scale = list(batch.views), batch.labels["score"], scale_of(parameters, settings, 0.3)
    seed, step, keys = settings.get("seed", 0), batch.clock.step, randomness.keys_of(batch.ids)
    there = {n: batch.present.get(n, torch.ones(len(batch), dtype=torch.bool)) & (batch.weight > 0) for n in names}
    whole = torch.stack(list(there.values())).all(0)
    order = sorted((i for i in range(len(batch)) if whole[i]), key=lambda i: (float(y[i]), int(keys[i])))
    window, (a, b) = settings.get("window", 1.0), settings.get("beta", (2, 8))

    def lot(stream: int, *counters: Tensor) -> Tensor:
        return randomness.uniform(seed + stream, step, *counters, dtype=torch.float64)

    # the a-th smallest of n even numbers, from the ratios of successive ones
    ratios = [lot(2 + p, keys[:, None], keys).neg().add(1) ** (1 / (a + b - 1 - p)) for p in range(a)]
    shares = 1 - torch.stack(ratios).prod(0)
    anchors = [(name, i) for name in names for i in range(len(batch))]
    embedding = {(name, i): batch.views[name][i] for name, i in anchors}
    losses = {name: torch.zeros(len(batch), dtype=torch.float64) for name in names}
    valid = {name: torch.zeros(len(batch), dtype=torch.bool) for name in names}
    for name, i in anchors:
        if not there[name][i]:
            continue
        z, denominator, positives = embedding[name, i], [], []
        for other, j in anchors:
            if (other, j) == (name, i) or not there[other][j] or (j != i and batch.content[i] == batch.content[j]):
                continue
            logit, gap = scale * z @ embedding[other, j], (y[i] - y[j]).abs()
            denominator.append(logit + (1 + gap).log() * settings.get("magnify", True))
            if gap == 0:
                positives.append(logit)
            elif settings.get("mix_negatives", True):
                share = shares[i, j]
                mixed = share * z + (1 - share) * embedding[other, j]
                weight = 1 + (y[i] - (share * y[i] + (1 - share) * y[j])).abs()
                denominator.append(scale * z @ mixed + weight.log() * settings.get("magnify", True))
        below = [j for j in order if y[i] - window < y[j] < y[i]]
        above = [k for k in order if y[i] < y[k] < y[i] + window]
        for m in range(settings.get("mixtures", 4) if below and above else 0):
            stream = torch.tensor(m)
            j = below[int(lot(0, keys[i], stream, torch.tensor(0)) * len(below))]
            k = above[int(lot(0, keys[i], stream, torch.tensor(1)) * len(above))]
            part = (y[k] - y[i]) / (y[k] - y[j])
            for other in names:
                logit = scale * z @ (part * embedding[other, j] + (1 - part) * embedding[other, k])
                positives.append(logit)
                denominator.append(logit)
        if positives:
            losses[name][i] = torch.stack(denominator).logsumexp(0) - torch.stack(positives).mean()
            valid[name][i] = True
    return sum((batch.mean(losses[name], valid[name]) for name in names), torch.zeros(())) / len(names)


def ascl(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Feng and Patras 2022, section III, on the batch in the place of the queue."""
    first, second = list(batch.views.values())[:2]
    teacher = batch.views[settings["teacher"]] if "teacher" in settings else second.detach()
    negative = ~batch.not_negative
    some = negative.any(1, keepdim=True)
    pseudo = (teacher @ teacher.T / settings.get("teacher_temperature", 0.05)).masked_fill(~negative, -torch.inf)
    chance = pseudo.masked_fill(~some, 0).softmax(1) * negative
    entropy = -(chance * chance.where(chance > 0, 1).log()).sum(1, keepdim=True)
    confidence = 1 - entropy / negative.double().sum(1, keepdim=True).clamp_min(2).log()
    weight = (settings.get("neighbours", 1.0) * confidence * chance).clamp(0, 1) + torch.eye(
        len(batch), dtype=torch.float64
    )
    logits = (scale_of(parameters, settings, 0.1) * first @ second.T).masked_fill(batch.excluded, -torch.inf)
    log_p = logits.log_softmax(1).masked_fill(batch.excluded, 0)
    return batch.mean(-(weight * log_p).sum(1) / weight.sum(1))


def groco(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Shvetsova et al. 2023: an odd-even network with Cauchy comparators, sample by sample, on matrices."""
    names, k, steep = list(batch.views), settings.get("negatives", 10), settings.get("steepness", 1.0)
    present = torch.stack([batch.present.get(n, torch.ones(len(batch), dtype=torch.bool)) for n in names]).all(0)
    total = torch.zeros((), dtype=torch.float64)
    for name in names:
        anchor = batch.views[name]
        values, valid = torch.zeros(len(batch), dtype=torch.float64), torch.zeros(len(batch), dtype=torch.bool)
        there = batch.present.get(name, torch.ones(len(batch), dtype=torch.bool))
        for i in range(len(batch)):
            others = [batch.views[n][i] for n in names if n != name]
            pool = anchor[~batch.not_negative[i] & there]
            if settings.get("stop_candidates", True):
                others, pool = [o.detach() for o in others], pool.detach()
            if len(pool) < k or not present[i]:
                continue
            negatives = (pool @ anchor[i]).sort().values[-k:]
            x = torch.cat([negatives, torch.stack([o @ anchor[i] for o in others]).sort().values])
            n = len(x)
            moved = torch.eye(n, dtype=torch.float64)
            for layer in range(n):
                step = torch.eye(n, dtype=torch.float64)
                for j in range(layer % 2, n - 1, 2):
                    keep = 0.5 + (steep * (x[j + 1] - x[j])).atan() / math.pi
                    block = torch.stack([torch.stack([keep, 1 - keep]), torch.stack([1 - keep, keep])])
                    step = step.index_put((torch.tensor([[j], [j + 1]]), torch.tensor([[j, j + 1]])), block)
                x, moved = step @ x, moved @ step
            high = moved[:, k:].sum(1)
            target = torch.tensor([0.0] * k + [1.0] * (n - k), dtype=torch.float64)
            cross = torch.nn.functional.binary_cross_entropy(high.clamp(0, 1), target)
            values[i], valid[i] = cross, True
        total = total + batch.mean(values, valid) / len(names)
    return total


def inversions(batch: Batch, score: Tensor, scale: Tensor) -> Tensor:
    """log(1 + sum over i, k with y_i > y_k of exp(scale (s_k - s_i))), with the weights of i scaled to mean 1."""
    alive = batch.weight > 0
    score, label, weight = score[alive], batch.labels["score"][alive], batch.weight[alive]
    wrong = (label[:, None] > label) * (scale * (score[None] - score[:, None])).exp()
    return (1 + (weight / weight.mean() * wrong.sum(1)).sum()).log()


def cosent(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Huang et al. 2024."""
    first, second = batch.views.values()
    return inversions(batch, (first * second).sum(1), scale_of(parameters, settings, 0.05))


def angle(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Li and Li 2024, on torch's own complex numbers."""
    z, w = (torch.complex(*view.chunk(2, 1)) for view in batch.views.values())
    quotient = (z * w.conj()).sum(1) / (z.norm(dim=1) * w.norm(dim=1))
    angles = inversions(batch, (quotient.real + quotient.imag).abs(), scale_of(parameters, settings, 0.05))
    return (
        settings.get("cosine_weight", 1) * cosent(batch, parameters, settings)
        + settings.get("angle_weight", 1) * angles
    )


def score_regression(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Reimers and Gurevych 2019; with a learnt line, Barkan et al. 2020."""
    first, second = batch.views.values()
    score = torch.nn.functional.cosine_similarity(first, second)
    if settings.get("affine"):
        score = parameters["factor"] * score + parameters["offset"]
    miss = (score - batch.labels["score"]).abs()
    huber = torch.where(miss < 1, miss**2 / 2, miss - 0.5)
    return batch.mean({"squared": miss**2, "absolute": miss, "huber": huber}[settings.get("error", "squared")])


def icon(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Alshammari et al. 2025: the cross-entropy of p and q."""
    scale, q, nu = scale_of(parameters, settings), settings.get("q", "cosine"), settings.get("degrees", 1.0)

    def score(x: Tensor, y: Tensor) -> Tensor:
        if q == "cosine":
            return scale * x @ y.T
        if q == "gaussian":
            return -squared(x, y) * scale / 2
        return (1 + squared(x, y) * scale / nu).pow(-(nu + 1) / 2).log()

    return neighbourhoods(batch, score, settings)


def icon_cluster(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """The same with q from a cluster of the anchor and a member of it."""
    scale, directions = scale_of(parameters, settings), normalize(parameters["directions"], dim=1)
    alive = batch.weight > 0

    def shares(view: Tensor) -> Tensor:
        return (scale * view @ directions.T).softmax(1)

    members = sum(shares(view)[alive].sum(0) for view in list(batch.views.values())[:2])
    return neighbourhoods(batch, lambda x, y: ((shares(x) / members) @ shares(y).T).log(), settings)


def neighbourhoods(batch: Batch, score: Any, settings: Settings) -> Tensor:
    """The cross-entropy of the given p and the softmax of `score`."""
    kind = settings.get("p", "pairs")
    if kind == "pairs":
        affinity = torch.eye(len(batch), dtype=torch.float64)
        if settings.get("same_side"):  # no positives within a view
            return soft_of(batch, score, [affinity, affinity], settings, within=torch.zeros_like(affinity))
    elif kind == "labels":
        label = batch.labels["class"]
        affinity = (label[:, None] == label).double()
    elif kind == "targets":
        affinity = batch.targets["soft"]
    else:
        left, right = (batch.views[name] for name in settings.get("teachers", ("a_teacher", "b_teacher")))
        alike = left @ right.T
        if kind == "neighbours":
            near = []
            for matrix in (alike, alike.T):
                ranked = matrix.masked_fill(batch.not_negative, -torch.inf)
                k = min(settings.get("k", 5), len(batch))
                near.append(((ranked >= ranked.topk(k, 1).values[:, -1:]) | batch.own).double())
            return soft_of(batch, score, near, settings)
        affinity = (alike / settings.get("p_temperature", 0.1)).exp()
    return soft_of(batch, score, [affinity, affinity.T], settings)


TEACHERS = ("a", "b", "a_teacher", "b_teacher")
REFERENCES: dict[str, Reference] = {
    "i-con-cluster": Reference(
        icon_cluster,
        [
            {"clusters": 4, "temperature": 0.5},
            {"clusters": 5, "temperature": 0.3, "p": "neighbours", "k": 3, "uniform": 0.2},
            {"clusters": 4, "temperature": 0.3, "p": "labels", "same_side": True},
        ],
        views=TEACHERS,
    ),
    "wasserstein": Reference(wasserstein, [{"temperature": 0.2}, {"temperature": 0.5, "target_temperature": 0.1}]),
    "wasserstein-gaussian": Reference(
        wasserstein_gaussian, [{"temperature": 0.2}, {"temperature": 0.5, "target_temperature": 0.1}], tolerance=1e-8
    ),
    "supremix": Reference(
        supremix,
        [{"mixtures": 2}, {"magnify": False, "beta": (1, 3), "window": 0.4, "mixtures": 3}],
        views=("a", "b"),
    ),
    "soft-targets": Reference(soft_targets, [{}, {"own_share": 0.4, "direction": "forward"}]),
    "soft-labels": Reference(soft_labels, [{"own_share": 0.5}, {"label_temperature": 0.1, "same_side": True}]),
    "y-aware": Reference(y_aware, [{"own_share": 0.5}, {"label": "vector", "sigma": 0.5, "same_side": True}]),
    "listnet": Reference(listnet, [{"target_temperature": 0.05}]),
    "listmle": Reference(listmle, [{"k": 2}, {"k": 12}]),
    "cwcl": Reference(cwcl, [{"teacher": "a_teacher"}, {}, {"direction": "forward"}], views=TEACHERS),
    "gcl": Reference(gcl, [{}, {"label": "class", "weight": "inverse-log"}, {"normalise": True}]),
    "ascl": Reference(
        ascl, [{}, {"neighbours": 5.0, "teacher_temperature": 0.3, "teacher": "b_teacher"}], views=TEACHERS
    ),
    "groco": Reference(
        groco,
        [{"negatives": 3, "steepness": 30.0}, {"negatives": 2, "stop_candidates": False}],
        views=("a", "b", "c"),
        missing=True,
    ),
    "cosent": Reference(cosent, [{"temperature": 0.4}, {"learn_temperature": True}]),
    "angle": Reference(angle, [{"temperature": 0.5}, {"cosine_weight": 0.3}]),
    "score-regression": Reference(score_regression, [{}, {"affine": True, "error": "huber"}, {"error": "absolute"}]),
    "i-con": Reference(
        icon,
        [
            {"q": "gaussian", "uniform": 0.3, "same_side": True},
            {"p": "labels", "q": "student-t", "degrees": 3.0},
            {"p": "kernel"},
            {"p": "neighbours", "k": 3, "q": "student-t"},
            {"p": "targets", "uniform": 0.2},
        ],
        views=TEACHERS,
    ),
}
