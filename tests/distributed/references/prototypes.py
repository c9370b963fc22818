"""References of the objectives on prototypes and neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from cl.engine import randomness
from tests.distributed.references.batch import Batch, Reference
from tests.distributed.references.noncontrastive import average, followed, head
from tests.distributed.references.state import constant_scale, moco


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Caron et al. 2020, listing of algorithm 1: rows are samples, columns prototypes."""
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / prototypes
        q = q / q.sum(0, keepdim=True) / samples
    return (q * samples).T


def swav(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    alive = batch.weight > 0
    directions = normalize(parameters["prototypes"], dim=1)
    scores = [view[alive] @ directions.T for view in batch.views.values()]
    losses = []
    for v in range(2):
        code = sinkhorn(scores[v].detach(), settings["epsilon"], 3)
        losses += [-(code * (s / 0.1).log_softmax(1)).sum(1) for u, s in enumerate(scores) if u != v]
    weight = batch.weight[alive]
    return weight @ torch.stack(losses).mean(0) / weight.sum()


def nnclr(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Dwibedi et al. 2021, symmetrised, with the queue of first views."""
    known = batch.memory.get("queue", torch.zeros(0, 6, dtype=torch.float64))
    first, second = batch.views["a"], batch.views["b"]
    total = torch.zeros(len(batch), dtype=torch.float64)
    for anchor, other in ((first, second), (second, first)):
        near = known[(anchor.detach() @ known.T).argmax(1)] if len(known) else anchor.detach()
        scores = parameters["temperature.log_scale"].exp() * near @ other.T
        total = total + (scores.masked_fill(batch.excluded, -torch.inf).logsumexp(1) - scores.diagonal()) / 2
    batch.memory["queue"] = torch.cat([known, first.detach()[batch.weight > 0]])[-settings["queue"] :]
    return batch.mean(total)


def prototypical(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Li et al. 2021; the prototypes after each step are in the state."""
    known: dict[int, Tensor] = batch.memory.setdefault("prototypes", {})
    scale = parameters["temperature.log_scale"].exp()
    classes = batch.labels["class"]
    loss = torch.zeros((), dtype=torch.float64)
    if known:
        order = sorted(known)
        scores = scale * batch.views["a"] @ torch.stack([known[c] for c in order]).T
        has = torch.tensor([int(c) in known for c in classes])
        place = torch.tensor([order.index(int(c)) if int(c) in known else 0 for c in classes])
        loss = batch.mean(scores.logsumexp(1) - scores.gather(1, place[:, None])[:, 0], has)
    else:
        loss = loss + 0 * batch.views["a"].sum()
    source = batch.views[settings.get("prototype_view", "a")].detach()
    for c in range(3):
        members = (classes == c) & (batch.weight > 0)
        if members.any():
            mean = source[members].mean(0)
            share = settings["momentum"] if c in known else 0.0
            known[c] = normalize(share * known[c] + (1 - share) * mean, dim=0) if c in known else normalize(mean, dim=0)
    nothing = torch.zeros(6, dtype=torch.float64)
    batch.memory["state"] = {"prototypes": torch.stack([known.get(c, nothing) for c in range(3)])}
    return loss


def clusterns(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Deng et al. 2023, with the centres of earlier steps."""
    scale = parameters["temperature.log_scale"].exp()
    first, second = batch.views["a"], batch.views["b"]
    cosine = first @ second.T
    logits = [(scale * cosine).masked_fill(batch.excluded, -torch.inf)]
    far = torch.zeros(len(batch), dtype=torch.float64)
    centres: Tensor | None = batch.memory.get("centres")
    alive = batch.weight > 0
    if centres is not None:
        near = (first.detach() @ centres.T).argsort(1, descending=True)
        weight = torch.eye(len(batch), dtype=torch.float64) * (settings.get("hard_weight", 1.0) - 1) + 1
        hard = weight.log() + scale * first @ centres[near[:, 1]].T
        logits.append(hard.masked_fill(batch.excluded, -torch.inf))
        apart = cosine - cosine.diagonal()[:, None]
        band = (apart + settings.get("alpha", 0.2)).relu() + (-apart - settings.get("beta", 0.5)).relu()
        false = (near[:, :1] == near[:, 0]) & ~batch.not_negative
        far = (band * false).sum(1) / (~batch.excluded).sum(1).clamp_min(1)
    loss = batch.mean(torch.cat(logits, 1).logsumexp(1) - scale * cosine.diagonal())
    rows = first.detach()[alive]
    if centres is not None:
        for k in range(len(centres)):
            members = first.detach()[alive & (near[:, 0] == k)]
            if len(members):
                moved = settings["momentum"] * centres[k] + (1 - settings["momentum"]) * members.mean(0)
                centres[k] = normalize(moved, dim=0)
    elif rows.mean(0) @ second.detach()[alive].mean(0) <= settings["start"]:
        chosen = [int(randomness.keys_of(batch.ids[alive]).argmin())]
        while len(chosen) < settings["clusters"]:
            chosen.append(min(set(range(len(rows))) - set(chosen), key=lambda j: float(rows[j] @ rows[chosen[-1]])))
        batch.memory["centres"] = rows[chosen].clone()
    if "centres" in batch.memory:
        batch.memory["state"] = {"centres": batch.memory["centres"].clone()}
    return loss + settings.get("margin_weight", 1e-4) * batch.mean(far)


def attend(rows: Tensor, parameters: Mapping[str, Tensor], prefix: str, heads: int) -> Tensor:
    """Vaswani et al. 2017: encoder layers with a norm after each part; the first place of the last."""
    count, width = rows.shape[1:]
    for place in range(count):
        angles = [place / 10000 ** (2 * (d // 2) / width) for d in range(width)]
        wave = [math.cos(a) if d % 2 else math.sin(a) for d, a in enumerate(angles)]
        rows = rows + torch.eye(count, dtype=rows.dtype)[place][:, None] * torch.tensor(wave, dtype=rows.dtype)
    for number in range(sum(key.startswith(prefix) and key.endswith("linear1.weight") for key in parameters)):

        def of(name: str, at: str = f"{prefix}.layers.{number}.") -> Tensor:
            return parameters[at + name]

        q, k, v = (rows @ of("self_attn.in_proj_weight").T + of("self_attn.in_proj_bias")).chunk(3, 2)
        mixed = []
        for part in range(heads):
            at = slice(part * width // heads, (part + 1) * width // heads)
            chance = (q[..., at] @ k[..., at].mT / math.sqrt(width // heads)).softmax(2)
            mixed.append(chance @ v[..., at])
        found = torch.cat(mixed, 2) @ of("self_attn.out_proj.weight").T + of("self_attn.out_proj.bias")
        rows = layer_norm(rows + found, [width], of("norm1.weight"), of("norm1.bias"))
        inside = (rows @ of("linear1.weight").T + of("linear1.bias")).relu()
        found = inside @ of("linear2.weight").T + of("linear2.bias")
        rows = layer_norm(rows + found, [width], of("norm2.weight"), of("norm2.bias"))
    return rows[:, 0]


def nearest_of(known: Tensor, anchors: Tensor, count: int) -> Tensor:
    """[N, count, D] of a queue, or the anchors themselves."""
    if len(known) < count:
        return anchors.detach()[:, None].repeat(1, count, 1)
    return known[(anchors.detach() @ known.T).argsort(1, descending=True)[:, :count]]


def all4one(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Estepa et al. 2023, on the samples that are not masked."""
    alive, weight = batch.weight > 0, batch.weight[batch.weight > 0]
    scale, k = constant_scale(settings["temperature"]), settings["neighbours"]
    slow = followed(batch, parameters, "projector", settings["momentum"])
    views = [head(batch.views[name][alive], parameters, "projector") for name in ("a", "b")]
    targets = [normalize(head(batch.views[f"{n}_teacher"][alive], slow, "projector"), dim=1).detach() for n in "ab"]
    known = batch.memory.get("queue", torch.zeros(0, targets[0].shape[1], dtype=torch.float64))
    near = [nearest_of(known, target, k) for target in targets]
    excluded = batch.excluded[alive][:, alive]

    def contrast(anchors: list[Tensor], others: list[Tensor]) -> Tensor:
        losses = []
        for x, y in ((anchors[0], others[1]), (anchors[1], others[0])):
            logits = scale * normalize(x, dim=1) @ normalize(y, dim=1).T
            losses.append(logits.masked_fill(excluded, -torch.inf).logsumexp(1) - logits.diagonal())
        return average((losses[0] + losses[1]) / 2, weight)

    def read(rows: Tensor) -> Tensor:
        return attend(rows, parameters, "attention", settings["heads"])

    first = contrast([each[:, 0] for each in near], [head(view, parameters, "predictor") for view in views])
    shifted = [
        read(torch.cat([head(view, parameters, "second_predictor")[:, None], each[:, :-1]], 1))
        for view, each in zip(views, near, strict=True)
    ]
    second = contrast([read(each) for each in near], shifted)
    on, off = [], []
    for target, view in zip(targets, views[::-1], strict=True):
        x, y = (weight.sqrt()[:, None] * rows for rows in (target, view))
        matrix = (x / x.norm(dim=0)).T @ (y / y.norm(dim=0))
        own = torch.eye(len(matrix), dtype=torch.bool)
        on.append((matrix[own] - 1) ** 2)
        off.append(matrix[~own] ** 2)
    third = 10 * (torch.cat(on).mean().sqrt() / 2 + torch.cat(off).mean().sqrt() / 2)
    batch.memory["queue"] = torch.cat([known, targets[0]])[-settings["queue"] :]
    weights = [settings.get(f"{name}_weight", 0.5) for name in ("neighbour", "centroid", "feature")]
    return weights[0] * first + weights[1] * second + weights[2] * third


def local_group(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Zhou et al. 2022: MoCo's loss on groups."""
    slow = followed(batch, parameters, "attention", settings["momentum"])
    known = batch.memory.get("known", torch.zeros(0, 6, dtype=torch.float64))

    def grouped(name: str, of: Mapping[str, Tensor]) -> Tensor:
        rows = batch.views[name]
        sequence = torch.cat([rows[:, None], nearest_of(known, rows, settings["neighbours"])], 1)
        return normalize(attend(sequence, of, "attention", settings["heads"]), dim=1)

    views = {name: grouped(name, slow if name.endswith("teacher") else parameters) for name in batch.views}
    loss = moco(replace(batch, views=views), parameters, {"temperature": 0.2, **settings})
    newest = batch.views["b_teacher"].detach()[batch.weight > 0]
    batch.memory["known"] = torch.cat([known, newest])[-settings["memory"] :]
    return loss


TEACHERS = ("a", "b", "a_teacher", "b_teacher")
REFERENCES: dict[str, Reference] = {
    "swav": Reference(swav, [{"prototypes": 5, "epsilon": 0.3}], views=("a", "b", "c")),
    "clusterns": Reference(
        clusterns,
        [
            {"clusters": 3, "momentum": 0.6, "start": 1.0, "temperature": 0.2, "margin_weight": 0.7},
            {"clusters": 4, "momentum": 0.9, "start": 0.02, "hard_weight": 2.5, "alpha": 0.0, "beta": 0.1},
        ],
    ),
    "all4one": Reference(
        all4one,
        [
            {
                "queue": 13,
                "neighbours": 3,
                "temperature": 0.3,
                "momentum": 0.7,
                "projector": [7, 4],
                "predictor": [5],
                "layers": 2,
                "heads": 2,
                "feature_weight": 0.2,
            }
        ],
        views=TEACHERS,
    ),
    "local-group": Reference(
        local_group,
        [
            {"queue": 9, "memory": 11, "neighbours": 2, "layers": 1, "heads": 3, "momentum": 0.7},
            {
                "queue": 40,
                "memory": 9,
                "neighbours": 3,
                "layers": 2,
                "heads": 2,
                "momentum": 0.5,
                "direction": "both",
                "in_batch": True,
            },
        ],
        views=TEACHERS,
    ),
    "nnclr": Reference(nnclr, [{"queue": 13, "temperature": 0.2}]),
    "prototypical": Reference(
        prototypical,
        [{"classes": 3, "momentum": 0.6}, {"classes": 3, "momentum": 0.6, "prototype_view": "b"}],
    ),
}
