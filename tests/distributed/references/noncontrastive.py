"""References of the objectives without negatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, normalize

from cl.engine import randomness
from tests.distributed.references.batch import Batch, Reference
from tests.distributed.references.pairwise import infonce


def alive(batch: Batch) -> Tensor:
    return batch.weight > 0


def views_of(batch: Batch) -> list[Tensor]:
    """The trained views, without masked samples."""
    return [view[alive(batch)] for name, view in batch.views.items() if not name.endswith("teacher")]


def kept_weight(batch: Batch) -> Tensor:
    return batch.weight[alive(batch)]


def average(values: Tensor, weight: Tensor) -> Tensor:
    return (weight @ values) / weight.sum()


def batch_norm(rows: Tensor) -> Tensor:
    return (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt()


def head(rows: Tensor, parameters: Mapping[str, Tensor], prefix: str) -> Tensor:
    """Linear, batch norm over the samples, ReLU, ..., linear; by the names of the objective's parameters."""
    count = sum(key.startswith(f"{prefix}.layers.") and key.endswith("weight") for key in parameters)
    for number in range(count):
        rows = rows @ parameters[f"{prefix}.layers.{number}.weight"].T
        if number == count - 1:
            rows = rows + parameters[f"{prefix}.layers.{number}.bias"]
        else:
            scale, shift = parameters[f"{prefix}.norms.{number}.weight"], parameters[f"{prefix}.norms.{number}.bias"]
            rows = (batch_norm(rows) * scale + shift).relu()
    return rows


def projected(batch: Batch, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    return [head(view, parameters, "projector") for view in views_of(batch)]


def barlow_twins(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Zbontar et al. 2021, algorithm 1; with weights, means are weighted."""
    first, second = projected(batch, parameters)
    weight = kept_weight(batch)

    def standard(x: Tensor) -> Tensor:
        centred = x - average(x, weight)
        return centred / (average(centred**2, weight) + 1e-5).sqrt()

    c = (weight[:, None] * standard(first)).T @ standard(second) / weight.sum()
    penalty = (c - torch.eye(len(c), dtype=c.dtype)) ** 2
    penalty = torch.where(torch.eye(len(c), dtype=torch.bool), penalty, settings.get("off_diagonal", 0.0051) * penalty)
    return settings.get("scale", 1.0) * penalty.sum()


VICREG = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}


def vicreg(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Bardes et al. 2022, algorithm 1; with weights, means are weighted and N is their sum."""
    weight = kept_weight(batch)
    views = projected(batch, parameters)
    dim = views[0].shape[1]
    weights = [settings.get(name, default) for name, default in VICREG.items()]
    loss = weights[0] * average(((views[0] - views[1]) ** 2).mean(1), weight)
    for x in views:
        centred = x - average(x, weight)
        covariance = (weight[:, None] * centred).T @ centred / (weight.sum() - 1)
        deviation = (covariance.diagonal() + 1e-4).sqrt()
        loss = loss + weights[1] * (settings.get("target", 1.0) - deviation).relu().mean() / 2
        off = covariance[~torch.eye(dim, dtype=torch.bool)]
        loss = loss + weights[2] * (off**2).sum() / dim
    return loss


def w_mse(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Ermolov et al. 2021: the inverse Cholesky factor itself, applied to each view or to both."""
    eps = settings.get("eps", 1e-3)

    def white(rows: Tensor, weight: Tensor) -> Tensor:
        centred = rows - average(rows, weight)
        covariance = (weight[:, None] * centred).T @ centred / (weight.sum() - 1)
        factor = torch.linalg.cholesky((1 - eps) * covariance + eps * torch.eye(len(covariance), dtype=rows.dtype))
        return normalize(centred @ torch.linalg.inv(factor).T, dim=1)

    views, weight = projected(batch, parameters), kept_weight(batch)
    if settings.get("apart", True):
        first, second = (white(view, weight) for view in views)
    else:
        first, second = white(torch.cat(views), weight.repeat(2)).chunk(2)
    return average(((first - second) ** 2).sum(1), weight)


def whitened(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Zhuo et al. 2023: ZCA by the symmetric square root of each shuffled group's covariance, then CLIP's loss."""
    inner = {key.removeprefix("inner."): value for key, value in parameters.items()}
    total = torch.zeros((), dtype=torch.float64)
    shuffles = settings.get("shuffles", 1)
    for shuffle in range(shuffles):
        order = randomness.bits(shuffle, batch.clock.step, torch.arange(6)).argsort()
        views = {}
        for name, view in batch.views.items():
            white = torch.zeros_like(view)
            for start in range(0, 6, settings["group"]):
                group = order[start : start + settings["group"]]
                x = view[alive(batch)][:, group]
                covariance = x.T.cov(correction=0).view(len(group), len(group))
                covariance = covariance + settings.get("eps", 1e-4) * torch.eye(len(group), dtype=x.dtype)
                values, vectors = torch.linalg.eigh(covariance)
                root = vectors @ (values**-0.5).diag() @ vectors.T
                white = white.index_put((alive(batch).nonzero(), group[None]), (x - x.mean(0)) @ root)
            views[name] = normalize(white, dim=1)
        total = total + infonce(replace(batch, views=views), inner, {}) / shuffles
    return total


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return (normalize(first, dim=1) * normalize(second, dim=1)).sum(1)


def simsiam(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Chen and He 2021, algorithm 1."""
    first, second = projected(batch, parameters)
    left = cosine(head(first, parameters, "predictor"), second.detach())
    right = cosine(head(second, parameters, "predictor"), first.detach())
    return average(-(left + right) / 2, kept_weight(batch))


def followed(batch: Batch, parameters: Mapping[str, Tensor], network: str, momentum: float) -> dict[str, Tensor]:
    """The moving average of a network's parameters, which starts as their copy; kept from step to step."""
    fast = {key: p.detach().clone() for key, p in parameters.items() if key.startswith(f"{network}.")}
    slow = batch.memory.get("slow", fast)
    slow = {key: momentum * slow[key] + (1 - momentum) * fast[key] for key in fast}
    batch.memory["slow"] = slow
    state = {f"slow.module.{key.removeprefix(network + '.')}": value for key, value in slow.items()}
    batch.memory["state"] = {**batch.memory.get("state", {}), **state}
    return slow


def byol(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Grill et al. 2020, eq. 2, symmetrised."""
    first, second = projected(batch, parameters)
    slow = followed(batch, parameters, "projector", settings.get("momentum", 0.996))
    teachers = [
        head(view[alive(batch)], slow, "projector") for name, view in batch.views.items() if name.endswith("teacher")
    ]
    left = 2 - 2 * cosine(head(first, parameters, "predictor"), teachers[1].detach())
    right = 2 - 2 * cosine(head(second, parameters, "predictor"), teachers[0].detach())
    return average(left + right, kept_weight(batch))


def dino(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Caron et al. 2021, algorithm 1, for two teacher views and any number of student views."""
    weight = kept_weight(batch)

    def logits(rows: Tensor, of: Mapping[str, Tensor]) -> Tensor:
        for number in (0, 2, 4):
            rows = rows @ of[f"head.layers.{number}.weight"].T + of[f"head.layers.{number}.bias"]
            rows = gelu(rows) if number < 4 else rows
        return normalize(rows, dim=1) @ normalize(of["head.directions"], dim=1).T

    slow = followed(batch, parameters, "head", settings["momentum"])
    students = [logits(view, parameters) for view in views_of(batch)]
    teachers = [
        logits(view[alive(batch)], slow).detach() for name, view in batch.views.items() if name.endswith("teacher")
    ]
    centre = batch.memory.get("centre", torch.zeros(settings["prototypes"], dtype=torch.float64))
    losses = []
    for t, teacher in enumerate(teachers):
        target = ((teacher - centre) / settings.get("teacher_temperature", 0.04)).softmax(1)
        losses += [-(target * (x / 0.1).log_softmax(1)).sum(1) for s, x in enumerate(students) if s != t]
    seen = sum(average(teacher, weight) for teacher in teachers) / len(teachers)
    batch.memory["centre"] = 0.9 * centre + 0.1 * seen
    batch.memory["state"]["centre"] = batch.memory["centre"]
    return average(torch.stack(losses).mean(0), weight)


def distance_correlation(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Szekely et al. 2007, with weights: double centring by plain means of a row, weighted over
    rows.
    """
    weight = kept_weight(batch) / kept_weight(batch).sum()

    def distances(x: Tensor) -> Tensor:
        square = ((x[:, None] - x) ** 2).sum(2)
        own = torch.eye(len(x), dtype=torch.bool)
        return square.masked_fill(own, 1).sqrt().masked_fill(own, 0)

    def covariance(a: Tensor, b: Tensor) -> Tensor:
        rows_a, rows_b = a.mean(1), b.mean(1)
        return weight @ (a * b).mean(1) - 2 * weight @ (rows_a * rows_b) + (weight @ rows_a) * (weight @ rows_b)

    x, *others = (distances(view[alive(batch)]) for view in batch.views.values())
    terms = [1 - covariance(x, y) / (covariance(x, x) * covariance(y, y)).sqrt() for y in others]
    return torch.stack(terms).mean()


def sparse_codes(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Wen et al. 2025: reconstruction from k and from 4 k entries, CLIP's loss on the codes."""
    shift = parameters["decoder.bias"]

    def code(x: Tensor, k: int) -> Tensor:
        dense = ((x - shift) @ parameters["encoder.weight"].T + parameters["encoder.bias"]).relu()
        rank = dense.argsort(1, descending=True).argsort(1)
        return dense * (rank < k)

    loss = torch.zeros((), dtype=torch.float64)
    codes = {}
    for name, view in batch.views.items():
        view = view.where(alive(batch)[:, None], 0)
        for k, factor in ((settings["active"], 1.0), (4 * settings["active"], 0.125)):
            rebuilt = code(view, k) @ parameters["decoder.weight"].T + shift
            loss = loss + factor * batch.mean(((view - rebuilt) ** 2).sum(1))
        codes[name] = normalize(code(view, settings["active"]), dim=1)
    return loss + settings.get("contrast", 1.0) * infonce(replace(batch, views=codes), parameters, {})


def hashing(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """tanh codes, CLIP's loss on them, quantisation and bit balance."""
    inner = {key.removeprefix("inner."): value for key, value in parameters.items()}
    beta = settings.get("sharpness", 1.0)
    if isinstance(beta, dict):
        beta = beta["start"] + (beta["end"] - beta["start"]) * batch.clock.step / batch.clock.total
    codes = {name: (beta * view @ parameters["project.weight"].T).tanh() for name, view in batch.views.items()}
    penalty = torch.zeros((), dtype=torch.float64)
    for code in codes.values():
        kept, weight = code[alive(batch)], kept_weight(batch)
        rough = average(((kept.abs() - 1) ** 2).mean(1), weight)
        penalty = penalty + (0.1 * rough + 0.1 * (average(kept, weight) ** 2).mean()) / len(codes)
    views = {name: normalize(code, dim=1) for name, code in codes.items()}
    return infonce(replace(batch, views=views), inner, {}) + penalty


TEACHERS = ("a", "b", "a_teacher", "b_teacher")
INNER = {"name": "infonce"}
REFERENCES: dict[str, Reference] = {
    "barlow-twins": Reference(barlow_twins, [{}, {"projector": [7, 4], "off_diagonal": 0.2, "scale": 0.1}]),
    "vicreg": Reference(
        vicreg, [{"target": 0.4}, {"projector": [7, 4], "invariance": 0.5, "variance": 0.3, "covariance": 0.2}]
    ),
    "w-mse": Reference(w_mse, [{"projector": [2], "eps": 0.01}], tolerance=1e-8),
    "whitened": Reference(whitened, [{"objective": INNER, "group": 2, "shuffles": 2, "eps": 0.01}], tolerance=1e-8),
    "simsiam": Reference(simsiam, [{"projector": [], "predictor": [4]}, {"projector": [7, 4], "predictor": []}]),
    "byol": Reference(byol, [{"projector": [7, 4], "predictor": [3], "momentum": 0.7}], views=TEACHERS),
    "dino": Reference(
        dino,
        [{"hidden": 5, "bottleneck": 4, "prototypes": 7, "momentum": 0.8, "teacher_temperature": 0.3}],
        views=("a", "b", "c", "a_teacher", "b_teacher"),
    ),
    "distance-correlation": Reference(distance_correlation, [{}], views=("a", "b", "b_teacher")),
    "sparse-codes": Reference(sparse_codes, [{"width": 13, "active": 3}]),
    "hashing": Reference(
        hashing,
        [{"objective": INNER, "bits": 5}, {"objective": INNER, "bits": 5, "sharpness": {"start": 1.0, "end": 4.0}}],
    ),
}
