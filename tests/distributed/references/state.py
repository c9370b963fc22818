"""References of the objectives that remember: moving averages for each sample, momentum encoders with queues."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.distributed.references.batch import Batch, Reference

Ids = list[tuple[int, int]]


def ids_of(batch: Batch) -> Ids:
    return [(int(first), int(second)) for first, second in batch.ids]


def gamma_of(batch: Batch, settings: Mapping[str, Any]) -> float:
    """Wei et al. 2024."""
    gamma, decay = settings["gamma"], settings["gamma_decay_epochs"]
    if settings["gamma_schedule"] == "constant" or batch.clock.epoch >= decay:
        return gamma
    return 0.5 * (1 + math.cos(math.pi * batch.clock.epoch / decay)) * (1 - gamma) + gamma


def distances(batch: Batch, taus: list[Tensor], same_side: bool) -> list[tuple[Tensor, Tensor]]:
    """For each direction: (s_ij - s_ii) / tau_i [N, M] and which j are negatives of i [N, M]."""
    first, second = batch.views.values()
    found = []
    for (anchor, other), tau in zip([(first, second), (second, first)], taus, strict=True):
        scores, negatives = anchor @ other.T, ~batch.not_negative
        own = scores.diagonal()[:, None]
        if same_side:
            scores, negatives = torch.cat([scores, anchor @ anchor.T], 1), negatives.repeat(1, 2)
        found.append(((scores - own) / tau, negatives))
    return found


def inner(d: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """g_i = mean of exp(d_ij) over the negatives, and which i have any."""
    count = negatives.sum(1)
    return d.exp().where(negatives, 0).sum(1) / count.clamp_min(1), count > 0


def by_id(ids: Ids, valid: Tensor) -> dict[tuple[int, int], list[int]]:
    """The rows of each id that occurs among the valid rows."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(ids):
        if valid[row]:
            rows.setdefault(key, []).append(row)
    return rows


def estimates(batch: Batch, g: list[Tensor], valid: Tensor, gamma: float) -> list[Tensor]:
    """u_i <- (1 - gamma) u_i + gamma g_i of each direction; the first one is g_i; rows of one id share the mean g."""
    kept = batch.memory.setdefault("u", [{}, {}])
    result = []
    for u, now in zip(kept, g, strict=True):
        rows_u = torch.ones_like(now)
        for key, rows in by_id(ids_of(batch), valid).items():
            mean = now[rows].detach().mean()
            u[key] = (1 - gamma) * u[key] + gamma * mean if key in u else mean
            rows_u[rows] = u[key]
        result.append(rows_u)
    return result


DEFAULTS = {"gamma": 0.2, "gamma_schedule": "cosine", "gamma_decay_epochs": 1, "epsilon": 1e-14, "same_side": False}


def constant_scale(tau: float) -> Tensor:
    """What a temperature that is not trained is kept as."""
    return torch.tensor(-math.log(tau)).double().exp()


def global_contrastive(
    batch: Batch, scale: Tensor, settings: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
    """mean of [g1 / (eps + u1) + g2 / (eps + u2)] / 2; the estimates; who takes part; g."""
    both = distances(batch, [1 / scale, 1 / scale], settings["same_side"])
    g, some = zip(*(inner(d, negatives) for d, negatives in both), strict=True)
    valid = some[0] & some[1] & (batch.weight > 0)
    u = estimates(batch, list(g), valid, gamma_of(batch, settings))
    ratio = sum(x / (settings["epsilon"] + y) for x, y in zip(g, u, strict=True))
    return batch.mean(ratio / 2, valid), u, valid, list(g)


def fastclip_v0(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Wei et al. 2024: the temperature's gradient is that of the unscaled loss."""
    return global_contrastive(batch, parameters["temperature.log_scale"].exp(), {**DEFAULTS, **settings})[0]


def fastclip_v1(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    return global_contrastive(batch, constant_scale(0.03), {**DEFAULTS, **settings})[0]


def sogclr(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Yuan et al. 2022."""
    settings = {**DEFAULTS, "gamma": 0.8, "gamma_schedule": "constant", **settings}
    return global_contrastive(batch, constant_scale(0.03), settings)[0]


def fastclip_v3(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """sg(tau) loss + rho tau + tau / 2 mean(log u1 + log u2), and g's slope to tau once (paper) or twice (code)."""
    settings = {**DEFAULTS, "rho": 6.5, "temperature_rule": "code", **settings}
    tau = 1 / parameters["temperature.log_scale"].exp()
    loss, u, valid, g = global_contrastive(batch, 1 / tau, settings)
    code = settings["temperature_rule"] == "code"
    eps = 0.0 if code else settings["epsilon"]
    log_u = sum((eps + each).log() for each in u)
    total = tau.detach() * loss + batch.mean(settings["rho"] * tau + tau / 2 * log_u, valid)
    if code:  # the same number, with the slope to tau alone, once more
        ratio = torch.zeros(len(batch), dtype=torch.float64)
        for view, (x, y) in enumerate(zip(g, u, strict=True)):
            anchor, other = [v.detach() for v in list(batch.views.values())[:: 1 if view == 0 else -1]]
            scores = anchor @ other.T
            again, _ = inner((scores - scores.diagonal()[:, None]) / tau, ~batch.not_negative)
            ratio = ratio + (again - x.detach()) / (settings["epsilon"] + y)
        total = total + tau.detach() * batch.mean(ratio / 2, valid)
    return total


def individual(batch: Batch, settings: Mapping[str, Any]) -> Tensor:
    """Wei et al. 2024, v2, and Qiu et al. 2023.

    The authors' code keeps e^{-b} u, b the running maximum of d_ij, and adds eps to that: the paper's rule for eps = 0
    alone, where it is followed here. Otherwise b = 0: an old b would drown new estimates in eps e^b.
    """
    gamma, eps, tau_range = gamma_of(batch, settings), settings["epsilon"], (settings["tau_min"], settings["tau_max"])
    kept = batch.memory.setdefault("samples", [{}, {}])
    new = {"tau": settings["tau"], "m": 0.0, "v": 0.0, "b": 0.0, "u": None}
    keys = ids_of(batch)
    state = [[each.get(key, new) for key in keys] for each in kept]
    taus = [torch.tensor([s["tau"] for s in each], dtype=torch.float64) for each in state]
    both = distances(batch, [tau[:, None] for tau in taus], settings["same_side"])
    valid = (batch.weight > 0) & both[0][1].any(1) & both[1][1].any(1)
    loss = torch.zeros((), dtype=torch.float64)
    for side, (d, negatives) in enumerate(both):
        count = negatives.sum(1).clamp_min(1).double()
        ratio = torch.zeros(len(batch), dtype=torch.float64)
        for key, rows in by_id(keys, valid).items():
            old = state[side][rows[0]]
            b = max([old["b"]] + [float(d[row][negatives[row]].detach().max()) for row in rows]) if eps == 0 else 0.0
            g = {row: (d[row] - b).exp().where(negatives[row], 0).sum() / count[row] for row in rows}
            mean = sum(float(each.detach()) for each in g.values()) / len(rows)
            u = mean if old["u"] is None else (1 - gamma) * old["u"] * math.exp(old["b"] - b) + gamma * mean
            slopes = []
            for row in rows:
                ratio[row] = g[row] / (eps + u)
                tilted = ((d[row] - b).exp() * d[row]).where(negatives[row], 0).sum().detach()
                slopes.append(math.log(u + eps) + b + settings["rho"] - float(tilted) / count[row] / (u + eps))
            slope = min(max(float(sum(slopes)) / len(rows), -5.0), 5.0)
            kept[side][key] = {**step_of(old, slope, settings, batch.clock.epoch, tau_range), "b": b, "u": u}
        loss = loss + batch.mean(ratio, valid) / 2
    return loss


def step_of(
    old: Mapping[str, float], slope: float, settings: Mapping[str, Any], epoch: int, within: tuple[float, float]
) -> dict[str, float]:
    """One step of a sample's temperature."""
    if settings["temperature_rule"] == "momentum":
        beta = settings["temperature_beta"]
        m, v = (1 - beta) * old["m"] + beta * slope, 0.0
        step = m
    else:
        first, second = (0.0, 0.0) if epoch == 0 else (0.9, 0.999)
        m, v = first * old["m"] + (1 - first) * slope, second * old["v"] + (1 - second) * slope**2
        step = m / (1 - first ** (epoch + 1)) / (math.sqrt(v / (1 - second ** (epoch + 1))) + 1e-8)
    tau = min(max(old["tau"] - settings["temperature_lr"] * step, within[0]), within[1])
    return {"tau": tau, "m": m, "v": v}


def fastclip_v2(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    chosen = {"tau": 0.03, "tau_min": 0.01, "tau_max": 1.0, "rho": 7.0, "temperature_lr": 0.0133}
    return individual(batch, {**DEFAULTS, **chosen, "temperature_rule": "adam", **settings})


def isogclr(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    chosen: dict[str, Any] = {"tau": 0.07, "tau_min": 0.005, "tau_max": 1.0, "rho": 6.0, "temperature_lr": 0.01}
    chosen |= {"temperature_beta": 0.9, "gamma": 0.8, "gamma_schedule": "constant", "temperature_rule": "momentum"}
    return individual(batch, {**DEFAULTS, **chosen, **settings})


def moco(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """He et al. 2020, algorithm 1: cross-entropy of the own key among the queue's; then the batch's keys go in."""
    kind = settings.get("kind", "moco")
    scale = constant_scale(settings.get("temperature", 0.07 if kind == "moco" else 0.05))
    views = batch.views
    directions = [("a", "b_teacher"), ("b", "a_teacher")]
    if settings.get("direction", "both" if kind == "infoxlm" else "forward") == "forward":
        directions = directions[:1]
    size = settings["queue"]
    queues = batch.memory.setdefault("queues", [[] for _ in directions])  # of (key, content), oldest first
    loss = torch.zeros((), dtype=torch.float64)
    for queue, (query, key) in zip(queues, directions, strict=True):
        terms = []
        for i, anchor in enumerate(views[query]):
            scores = [anchor @ views[key][i]]
            scores += [anchor @ old for old, content in queue if content != batch.content[i]]
            if settings.get("in_batch"):
                scores += [anchor @ views[key][j] for j in range(len(batch)) if not batch.not_negative[i, j]]
            logits = scale * torch.stack(scores)
            terms.append(logits.logsumexp(0) - logits[0])
        loss = loss + batch.mean(torch.stack(terms)) / len(directions)
        queue += [(views[key][i].detach(), batch.content[i]) for i in range(len(batch)) if batch.weight[i] > 0]
        del queue[:-size]
    return loss


def moco_v3(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Chen et al. 2021, algorithm 1: ctr(q1, k2) + ctr(q2, k1), each 2 tau cross-entropy."""
    tau = 1 / constant_scale(0.2)
    loss = torch.zeros((), dtype=torch.float64)
    for query, key in (("a", "b_teacher"), ("b", "a_teacher")):
        logits = (batch.views[query] @ batch.views[key].T / tau).masked_fill(batch.excluded, -torch.inf)
        loss = loss + 2 * tau * batch.mean(logits.logsumexp(1) - logits.diagonal())
    return loss


def kind_of_moco(kind: str) -> Any:
    return lambda batch, parameters, settings: moco(batch, parameters, {**settings, "kind": kind})


TEACHERS = ("a", "b", "a_teacher", "b_teacher")
REFERENCES: dict[str, Reference] = {
    "fastclip-v0": Reference(fastclip_v0, [{"temperature": 0.5, "gamma": 0.3, "gamma_decay_epochs": 2}]),
    "fastclip-v1": Reference(fastclip_v1, [{}, {"epsilon": 0.01, "gamma_decay_epochs": 3}]),
    "fastclip-v2": Reference(fastclip_v2, [{}, {"tau": 0.3, "tau_max": 0.31, "gamma_decay_epochs": 2, "epsilon": 0.0}]),
    "fastclip-v3": Reference(
        fastclip_v3, [{"temperature": 0.2}, {"temperature": 0.2, "temperature_rule": "paper", "epsilon": 0.01}]
    ),
    "sogclr": Reference(sogclr, [{}, {"same_side": True, "gamma": 0.4}]),
    "isogclr": Reference(isogclr, [{}, {"same_side": True, "gamma": 0.4, "temperature_lr": 0.001, "epsilon": 0.0}]),
    "moco": Reference(
        moco,
        [
            {"queue": 14, "in_batch": True, "direction": "both"},
            {"queue": 6},
            {"queue": 9, "direction": "both", "temperature": 0.2},
        ],
        TEACHERS,
    ),
    "contriever": Reference(kind_of_moco("contriever"), [{"queue": 12, "direction": "both"}, {"queue": 40}], TEACHERS),
    "infoxlm": Reference(kind_of_moco("infoxlm"), [{"queue": 10}], TEACHERS),
    "moco-v3": Reference(moco_v3, views=TEACHERS),
}
