"""References of the objectives on prototypes and neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.distributed.references.batch import Batch, Reference


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
    """Dwibedi et al. 2021, eq. 3, symmetrised, with the queue of first views."""
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
    """Li et al. 2021, eq. 11; the prototypes after each step are in the state."""
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


REFERENCES: dict[str, Reference] = {
    "swav": Reference(swav, [{"prototypes": 5, "epsilon": 0.3}], views=("a", "b", "c")),
    "nnclr": Reference(nnclr, [{"queue": 13, "temperature": 0.2}]),
    "prototypical": Reference(
        prototypical,
        [{"classes": 3, "momentum": 0.6}, {"classes": 3, "momentum": 0.6, "prototype_view": "b"}],
    ),
}
