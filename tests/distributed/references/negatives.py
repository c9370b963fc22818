"""References of the objectives that choose, weigh, mix or make negatives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cl.engine import randomness
from tests.distributed.references.batch import Batch, Reference
from tests.distributed.references.state import TEACHERS, by_id, constant_scale, ids_of

Parameters = Mapping[str, Tensor]
Settings = Mapping[str, Any]


def scale_of(parameters: Parameters) -> Tensor:
    return parameters["temperature.log_scale"].exp()


def directions(batch: Batch, settings: Settings) -> list[tuple[str, str]]:
    return [("a", "b"), ("b", "a")][: 1 if settings.get("direction") == "forward" else 2]


def scored(batch: Batch, anchor: str, other: str, same_side: bool) -> tuple[Tensor, Tensor]:
    """Scores of the anchors with all candidates [N, M], and which of them are negatives."""
    scores, negatives = batch.views[anchor] @ batch.views[other].T, ~batch.not_negative
    if same_side:
        scores = torch.cat([scores, batch.views[anchor] @ batch.views[anchor].T], 1)
        negatives = negatives.repeat(1, 2)
    return scores, negatives


def sides(loss: Any) -> Any:
    """The mean over directions of a loss (batch, scale, settings, anchor, other) -> values [N], valid [N]."""

    def whole(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
        ways = directions(batch, settings)
        terms = [loss(batch, scale_of(parameters), settings, *way) for way in ways]
        return torch.stack([batch.mean(values, valid) for values, valid in terms]).sum() / len(ways)

    return whole


def reweighted(defaults: Settings) -> Any:
    """Robinson et al. 2021, and what it becomes for beta = 0 (Chuang et al. 2020) and for DiHT."""

    def loss(batch: Batch, scale: Tensor, settings: Settings, anchor: str, other: str) -> tuple[Tensor, Tensor]:
        settings = {
            "tau_plus": 0.1,
            "beta": 1.0,
            "alpha": 1.0,
            "floor": True,
            "same_side": True,
            **defaults,
            **settings,
        }
        scores, negatives = scored(batch, anchor, other, settings["same_side"])
        count = negatives.sum(1)
        e = (scale * scores).exp().where(negatives, 0)
        positive = (scale * scores.diagonal()).exp()
        importance = e ** settings["beta"] * negatives
        mean = (importance * e).sum(1) / importance.sum(1).clamp_min(1e-300)
        g = (mean - settings["tau_plus"] * positive) / (1 - settings["tau_plus"])
        if settings["floor"]:
            g = torch.maximum(g, (-scale).exp())
        values = ((settings["alpha"] * positive + count * g) / positive).log()
        return values, count > 0

    return sides(loss)


def false_negatives(batch: Batch, settings: Settings, anchor: str, other: str) -> Tensor:
    """[N, M] bool: the candidates that look like the anchor."""
    scores, negatives = scored(batch, anchor, other, settings.get("same_side", False))
    teacher = settings.get("teacher")
    if teacher is not None:
        names = {f"{view}_{teacher}": batch.views[f"{view}_{teacher}"] for view in ("a", "b")}
        scores = names[f"{anchor}_{teacher}"] @ names[f"{other}_{teacher}"].T
    judged = scores.detach().masked_fill(~negatives, -torch.inf)
    found = torch.zeros_like(negatives)
    if "threshold" in settings or "k" in settings:
        found = judged >= settings.get("threshold", -torch.inf)
        if "k" in settings:
            k = min(settings["k"], judged.shape[1])
            edge = judged.topk(k, 1).values[:, -1:]
            found &= judged >= edge
    if "label" in settings:
        label = batch.labels[settings["label"]]
        same = label[:, None] == label
        found |= same.repeat(1, 2) if settings.get("same_side") else same
    return found & negatives


def elimination(
    batch: Batch, scale: Tensor, settings: Settings, anchor: str, other: str
) -> tuple[Tensor, Tensor | None]:
    """Huynh et al. 2022."""
    scores, negatives = scored(batch, anchor, other, settings.get("same_side", False))
    keep = negatives & ~false_negatives(batch, settings, anchor, other)
    keep[:, : len(batch)] |= batch.own
    return (scale * scores).masked_fill(~keep, -torch.inf).logsumexp(1) - scale * scores.diagonal(), None


def attraction(
    batch: Batch, scale: Tensor, settings: Settings, anchor: str, other: str
) -> tuple[Tensor, Tensor | None]:
    """Huynh et al. 2022."""
    scores, candidates = scored(batch, anchor, other, settings.get("same_side", False))
    positives = false_negatives(batch, settings, anchor, other)
    positives[:, : len(batch)] |= batch.own
    candidates[:, : len(batch)] |= batch.own
    log_p = scale * scores - (scale * scores).masked_fill(~candidates, -torch.inf).logsumexp(1, keepdim=True)
    return -log_p.where(positives, 0).sum(1) / positives.sum(1), None


def hardest(batch: Batch, scale: Tensor, settings: Settings, anchor: str, other: str) -> tuple[Tensor, Tensor | None]:
    """The positive and the k hardest negatives within the bounds."""
    scores, allowed = scored(batch, anchor, other, settings.get("same_side", False))
    own = scores.diagonal()
    if settings.get("low") is not None:
        allowed = allowed & (scores >= settings["low"])
    if settings.get("margin") is not None:
        allowed = allowed & (scores <= own[:, None] + settings["margin"])
    values = []
    for i in range(len(batch)):
        rest = scores[i][allowed[i]].sort(descending=True).values[: settings.get("k", 16)]
        logits = scale * torch.cat([own[i, None], rest])
        values.append(logits.logsumexp(0) - logits[0])
    return torch.stack(values), None


def mined(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Karpukhin et al. 2020, with a weight for the mined negatives."""
    scale, more = scale_of(parameters), batch.extra["negatives"]
    first, second = batch.views["a"], batch.views["b"]
    scores = scale * first @ second.T
    extra = scale * first @ more.embeddings.T + math.log(settings.get("mined_weight", 1.0))
    out = (batch.weight == 0)[:, None] | (batch.weight == 0)[more.owner] | (batch.content[:, None] == more.content)
    if not settings.get("shared", True):
        out = out | (torch.arange(len(batch))[:, None] != more.owner)
    both = [scores.masked_fill(batch.excluded, -torch.inf), extra.masked_fill(out, -torch.inf)]
    return batch.mean(torch.cat(both, 1).logsumexp(1) - scores.diagonal())


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def dclr(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Zhou et al. 2022; the gradient of the non-uniformity loss by autograd."""
    first, second = batch.views["a"], batch.views["b"]
    scale, count = scale_of(parameters), settings["noise"]
    noise = randomness.normal(
        0, batch.clock.step, torch.arange(count)[:, None], torch.arange(first.shape[1]), dtype=torch.float64
    )
    for _ in range(4):
        moved = noise.clone().requires_grad_()
        positive = (first * second).sum(1).detach()
        uniformity = (first.detach() @ unit(moved).T / 0.05).logsumexp(1) - positive / 0.05
        (slope,) = torch.autograd.grad(batch.mean(uniformity), moved)
        noise = noise + settings["noise_rate"] * unit(slope)
    scores = scale * first @ second.T
    out = batch.excluded
    if settings.get("teacher", "teacher") is not None:
        alike = batch.views["a_teacher"] @ batch.views["b_teacher"].T >= settings["threshold"]
        out = out | (alike & ~batch.own)
    candidates = torch.cat([scores.masked_fill(out, -torch.inf), scale * first @ unit(noise).T], 1)
    return batch.mean(candidates.logsumexp(1) - scores.diagonal())


def beta_of(order: int, seed: int, batch: Batch, counter: Tensor) -> Tensor:
    """The middle of 2 order - 1 uniform numbers has the distribution Beta(order, order)."""
    draws = randomness.uniform(
        seed, batch.clock.step, counter[:, None], torch.arange(2 * order - 1), dtype=torch.float64
    )
    return draws.sort(1).values[:, order - 1]


def keys(batch: Batch) -> Tensor:
    return randomness.keys_of(batch.ids)


class Memory:
    """A queue of `size` places, filled round and round; rows are (embedding, content)."""

    def __init__(self, size: int) -> None:
        self.rows: list[tuple[Tensor, int] | None] = [None] * size
        self.count = 0

    def push(self, batch: Batch, view: str) -> None:
        for i in range(len(batch)):
            if batch.weight[i] > 0:
                self.rows[self.count % len(self.rows)] = (batch.views[view][i].detach(), int(batch.content[i]))
                self.count += 1


def momentum(loss: Any) -> Any:
    """A loss (batch, queue, query, key, direction, settings) -> values [N] of one direction or of both."""

    def whole(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
        ways = [("a", "b_teacher"), ("b", "a_teacher")][: 2 if settings.get("direction") == "both" else 1]
        total = torch.zeros((), dtype=torch.float64)
        for number, (query, key) in enumerate(ways):
            queue = batch.memory.setdefault(f"queue.{number}", Memory(settings["queue"]))
            values = loss(batch, queue, batch.views[query], batch.views[key], number, settings)
            total = total + batch.mean(values) / len(ways)
            queue.push(batch, key)
        return total

    return whole


def mochi(batch: Batch, queue: Memory, query: Tensor, key: Tensor, direction: int, settings: Settings) -> Tensor:
    """Kalantidis et al. 2020."""
    scale = constant_scale(settings.get("temperature", 0.2))
    mixed, with_query = settings["mixed"], settings["mixed_with_query"]
    values = []
    for i, q in enumerate(query):
        negatives = [row[0] for row in queue.rows if row is not None and row[1] != int(batch.content[i])]
        hard = sorted(negatives, key=lambda n: -float((q @ n).detach()))[: settings["hardest"]]

        def numbers(stream: int, count: int) -> list[float]:
            places = torch.arange(count)
            counter = keys(batch)[i]  # noqa: B023
            streams = places * 0 + 5 * direction + stream
            return randomness.uniform(0, batch.clock.step, counter, places, streams, dtype=torch.float64).tolist()

        made = []
        if hard:
            n = len(hard)
            for alpha, j, k in zip(numbers(0, mixed), numbers(2, mixed), numbers(3, mixed), strict=True):
                made.append(unit(alpha * hard[int(j * n)] + (1 - alpha) * hard[int(k * n)]))
            for beta, j in zip(numbers(1, with_query), numbers(4, with_query), strict=True):
                made.append(unit(beta / 2 * q.detach() + (1 - beta / 2) * hard[int(j * n)]))
        logits = scale * torch.stack([q @ other for other in [key[i], *negatives, *made]])
        values.append(logits.logsumexp(0) - logits[0])
    return torch.stack(values)


def feature_transformation(
    batch: Batch, queue: Memory, query: Tensor, key: Tensor, direction: int, settings: Settings
) -> Tensor:
    """Zhu et al. 2021, on the features themselves."""
    scale = constant_scale(0.07)
    size, step = settings["queue"], batch.clock.step
    places = torch.arange(size)
    share = 1 + beta_of(2, 0, batch, keys(batch))
    chance = randomness.uniform(0, step, places, places * 0 + 1, dtype=torch.float64).tolist()
    order = sorted((place for place in range(size) if queue.rows[place] is not None), key=lambda place: chance[place])
    mu = beta_of(2, 1, batch, places)
    extrapolate = settings.get("extrapolation", 2) is not None
    values = []
    for i, q in enumerate(query):
        k = key[i]
        far_q, far_k = (share[i] * q + (1 - share[i]) * k, share[i] * k + (1 - share[i]) * q) if extrapolate else (q, k)
        scores = [far_q @ far_k]
        for number, place in enumerate(order):
            first, second = queue.rows[place], queue.rows[order[number - 1]]
            assert first is not None
            assert second is not None
            (n, content), (other, other_content) = first, second
            if int(batch.content[i]) not in (content, other_content):
                scores.append(q @ (mu[place] * n + (1 - mu[place]) * other))
        logits = scale * torch.stack(scores)
        values.append(logits.logsumexp(0) - logits[0])
    return torch.stack(values)


def mixup(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Lee et al. 2021, on embeddings."""
    first, second = batch.views["a"], batch.views["b"]
    key = keys(batch)
    share = beta_of(settings.get("beta", 1), 0, batch, key)
    chance = randomness.uniform(0, batch.clock.step, key, key * 0 + 1, dtype=torch.float64).tolist()
    order = sorted((i for i in range(len(batch)) if batch.weight[i] > 0), key=lambda i: chance[i])
    partner = torch.arange(len(batch))
    for number, i in enumerate(order):
        partner[i] = order[number - 1]
    mixed = unit(share[:, None] * first + (1 - share[:, None]) * first[partner])
    scores = scale_of(parameters) * mixed @ second.T
    other = torch.zeros_like(batch.own)
    other[torch.arange(len(batch)), partner] = True
    repeats = batch.content[partner][:, None] == batch.content
    out = (batch.excluded | (repeats & ~other)) & ~batch.own
    lse = scores.masked_fill(out, -torch.inf).logsumexp(1)
    positive = share * scores.diagonal() + (1 - share) * scores[torch.arange(len(batch)), partner]
    return batch.mean(lse - positive)


def gaussians(losses: Tensor) -> list[tuple[Any, Any, Any]]:
    """Two Gaussians as (share, mean, variance) by 30 rounds of expectation maximisation."""
    mean, variance = losses.mean(), losses.var(unbiased=False)
    least = 1e-6 * variance + 1e-12
    parts = [(0.5, mean - variance.sqrt(), variance + least), (0.5, mean + variance.sqrt(), variance + least)]
    for _ in range(30):
        density = torch.stack([w * (-((losses - m) ** 2) / (2 * v)).exp() / v.sqrt() for w, m, v in parts])
        chance = density / density.sum(0)
        parts = []
        for each in chance:
            m = (each * losses).sum() / each.sum()
            parts.append((each.mean(), m, ((each * (losses - m) ** 2).sum() / each.sum()).clamp_min(least)))
    return parts


def history(name: str) -> Any:
    """InfoNCE weighed or softened by what the losses of earlier steps say."""

    def loss(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
        kept = batch.memory.setdefault("losses", {})  # id -> (loss, visits)
        mean = settings.get("average", "last" if name == "noise-posterior" else "mean") == "mean"
        if batch.clock.epoch >= 1 and batch.memory.get("epoch") != batch.clock.epoch:
            batch.memory["epoch"] = batch.clock.epoch
            known = torch.tensor([value for value, _ in kept.values()], dtype=torch.float64)
            if name == "noise-posterior":
                batch.memory["description"] = gaussians(known)
            else:
                batch.memory["description"] = (known.mean(), known.std(unbiased=False))
        trust = torch.ones(len(batch), dtype=torch.float64)
        for i, key in enumerate(ids_of(batch)):
            if "posterior" in settings:
                trust[i] = batch.labels[settings["posterior"]][i]
            elif "description" in batch.memory and key in kept:
                trust[i] = probability(name, kept[key][0], batch.memory["description"], settings)
        scores = scale_of(parameters) * batch.views["a"] @ batch.views["b"].T
        ways = [scores, scores.T][: len(directions(batch, settings))]
        losses, terms = [], []
        for each in ways:
            nce = each.masked_fill(batch.excluded, -torch.inf).logsumexp(1) - each.diagonal()
            losses.append(nce)
            if settings.get("use", "weigh") == "weigh":
                terms.append(trust * nce)
            else:
                count = (~batch.excluded).sum(1).clamp_min(1)
                target = trust[:, None] * batch.own + (1 - trust[:, None]) * ~batch.excluded / count[:, None]
                log_p = each - each.masked_fill(batch.excluded, -torch.inf).logsumexp(1, keepdim=True)
                terms.append(-(target * log_p.where(~batch.excluded, 0)).sum(1))
        now = torch.stack(losses).mean(0).detach()
        for key, rows in by_id(ids_of(batch), batch.weight > 0).items():
            value, (old, visits) = float(now[rows].mean()), kept.get(key, (0.0, 0))
            kept[key] = (old + (value - old) / (visits + 1) if mean else value, visits + 1)
        return torch.stack([batch.mean(term) for term in terms]).sum() / len(ways)

    return loss


def probability(name: str, value: float, description: Any, settings: Settings) -> float:
    """p of a pair whose loss so far is `value`."""
    if name == "noise-posterior":
        densities = [float(w * (-((value - m) ** 2) / (2 * v)).exp() / v.sqrt()) for w, m, v in description]
        return densities[min((0, 1), key=lambda i: float(description[i][1]))] / sum(densities)
    mu, sigma = map(float, description)
    if mu - settings.get("low", 3.0) * sigma <= value <= mu + settings.get("high", 3.0) * sigma:
        return 1.0
    return math.exp(-((value - mu) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))


REFERENCES: dict[str, Reference] = {
    "debiased": Reference(
        reweighted({"beta": 0.0}),
        [{"temperature": 0.5}, {"temperature": 0.5, "tau_plus": 0.8, "same_side": False, "direction": "forward"}],
    ),
    "hcl": Reference(
        reweighted({}),
        [{"temperature": 0.5}, {"temperature": 1.0, "beta": 0.4, "tau_plus": 0.3, "same_side": False}],
    ),
    "diht": Reference(
        reweighted({"tau_plus": 0.0, "beta": 0.25, "alpha": 0.999, "floor": False, "same_side": False}),
        [{}, {"beta": 0.5, "alpha": 0.2, "direction": "forward"}],
    ),
    "false-negative-elimination": Reference(
        sides(elimination),
        [
            {"threshold": 0.6, "same_side": True},
            {"k": 2},
            {"label": "cluster", "direction": "forward"},
            {"teacher": "teacher", "threshold": 0.2, "k": 3},
        ],
        TEACHERS,
    ),
    "false-negative-attraction": Reference(
        sides(attraction),
        [
            {"label": "cluster"},
            {"threshold": 0.6, "same_side": True},
            {"k": 2, "direction": "forward"},
            {"label": "cluster", "teacher": "teacher", "threshold": 0.7},
        ],
        TEACHERS,
    ),
    "hardest-negatives": Reference(
        sides(hardest),
        [
            {"k": None, "low": -0.3, "margin": 0.1},
            {"k": 2, "same_side": True},
            {"k": 3, "margin": 0.0, "direction": "forward"},
        ],
    ),
    "mined-negatives": Reference(mined, [{}, {"mined_weight": 0.3, "shared": False}], extra=("negatives",)),
    "dclr": Reference(
        dclr,
        [
            {"noise": 5, "noise_rate": 0.5, "threshold": 0.3, "teacher": None, "temperature": 0.5},
            {"noise": 7, "noise_rate": 0.05, "threshold": 0.3},
        ],
        TEACHERS,
    ),
    "mochi": Reference(
        momentum(mochi),
        [
            {"queue": 15, "hardest": 6, "mixed": 4, "mixed_with_query": 3, "direction": "both", "in_batch": False},
            {"queue": 12, "hardest": 4, "mixed": 3, "mixed_with_query": 2},
            {"queue": 7, "hardest": 20, "mixed": 0, "mixed_with_query": 3, "temperature": 0.5},
        ],
        TEACHERS,
    ),
    "feature-transformation": Reference(
        momentum(feature_transformation),
        [{"queue": 15, "direction": "both"}, {"queue": 7, "extrapolation": None}],
        TEACHERS,
    ),
    "mixup": Reference(mixup, [{}, {"beta": 3}]),
    "noise-posterior": Reference(
        history("noise-posterior"),
        [
            {"temperature": 0.2},
            {"use": "soften", "average": "mean", "temperature": 0.2},
            {"posterior": "score", "use": "soften"},
        ],
    ),
    "bad-pair-mining": Reference(
        history("bad-pair-mining"),
        [{"temperature": 0.2, "low": 0.5, "high": 0.7}, {"low": 0.1, "direction": "forward"}],
    ),
}
