"""References of the supervised objectives, on all embeddings of all views stacked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

from cl.engine import randomness
from tests.distributed.references.batch import Batch, Reference

Parameters = Mapping[str, Tensor]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Stack:
    """The embeddings of all views [A, D] as anchors, and all that they compare with [C, D], themselves first.

    Attributes:
        sample, of: the samples of anchors [A] and candidates [C]; -1 for none.
        counts: [A, C], which candidates count: not itself, nothing masked, no other sample of the same content.
        valid: [A, C], the same, other samples of the same content included.
        views: the number of views.
    """

    anchors: Tensor
    candidates: Tensor
    sample: Tensor
    of: Tensor
    counts: Tensor
    valid: Tensor
    views: int

    @property
    def own(self) -> Tensor:
        """[A, C]: of the same sample."""
        return self.sample[:, None] == self.of

    def of_class(self, label: Tensor) -> Tensor:
        """[A, C]: of the same sample or with the same label."""
        return self.own | (label[self.sample][:, None] == label[self.of]) & (self.of >= 0)

    def mean(self, batch: Batch, values: Tensor, some: Tensor) -> Tensor:
        """The mean over views of each view's mean over its anchors with `some`."""
        parts = zip(values.chunk(self.views), some.chunk(self.views), strict=True)
        means = [batch.mean(value.where(keep, 0), keep) for value, keep in parts]
        return torch.stack(means).mean()


def stack(batch: Batch, extra: str | None = None) -> Stack:
    views = list(batch.views.values())
    sample = torch.arange(len(batch)).repeat(len(views))
    embeddings, of, content = torch.cat(views), sample, batch.content[sample]
    if extra is not None:
        more = batch.extra[extra]
        embeddings = torch.cat([embeddings, more.embeddings])
        of, content = torch.cat([sample, more.owner]), torch.cat([content, more.content])
    out = batch.weight == 0
    itself = torch.eye(len(sample), len(of), dtype=torch.bool)
    valid = ~(itself | out[sample][:, None] | out[of])
    same = batch.content[sample][:, None] == content
    own = sample[:, None] == of
    return Stack(torch.cat(views), embeddings, sample, of, valid & (~same | own), valid, len(views))


def lse(values: Tensor, keep: Tensor) -> Tensor:
    """log sum exp over the kept entries of each row, -inf for none, with a gradient of zeros there."""
    some = keep.any(1, keepdim=True)
    return values.masked_fill(~keep & some, -torch.inf).logsumexp(1).where(some[:, 0], -torch.inf)


def total(values: Tensor, keep: Tensor) -> Tensor:
    return values.masked_fill(~keep, 0).sum(1)


def scale(parameters: Parameters) -> Tensor:
    return parameters["temperature.log_scale"].exp()


def supcon(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Khosla et al. 2020, eq. 2 (out) and 3 (in)."""
    s = stack(batch, *settings.get("extra", []))
    scores = scale(parameters) * s.anchors @ s.candidates.T
    positives = s.of_class(batch.labels["class"]) & s.counts
    some, count = positives.any(1), positives.sum(1).clamp_min(1)
    chance = (scores - lse(scores, s.counts).where(s.counts.any(1), 0)[:, None]).masked_fill(~s.counts, -torch.inf)
    if settings.get("form", "out") == "out":
        losses = -total(chance, positives) / count
    else:
        losses = -(total(chance.exp(), positives) / count).where(some, 1).log()
    return s.mean(batch, losses, some)


def sincere(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Feeney and Hughes 2023: each positive alone against the negatives."""
    s = stack(batch)
    scores = (scale(parameters) * s.anchors @ s.candidates.T).exp()
    same = s.of_class(batch.labels["class"])
    negatives = total(scores, s.counts & ~same)[:, None]
    positives = s.counts & same
    losses = total(-(scores / (scores + negatives)).log(), positives) / positives.sum(1).clamp_min(1)
    return s.mean(batch, losses, positives.any(1))


def soft_nearest_neighbour(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Frosst et al. 2019."""
    s = stack(batch)
    near = (-scale(parameters) * (s.anchors[:, None] - s.candidates).square().sum(2)).exp()
    positives = s.counts & s.of_class(batch.labels["class"])
    some = positives.any(1)
    ratio = total(near, positives).where(some, 1) / total(near, s.counts).where(some, 1)
    return s.mean(batch, -ratio.log(), some)


def multi_positive(batch: Batch, parameters: Parameters, settings: Settings, label: str | None = None) -> Tensor:
    """Nie et al. 2024; Yang et al. 2022: soft targets over all right candidates, both ways."""
    label = settings.get("label", label)
    anchors, *others = batch.views.values()
    texts, of = torch.cat(others), torch.arange(len(batch)).repeat(len(others))
    content, negatives = batch.content[of], torch.zeros(len(of), dtype=torch.bool)
    for name in settings.get("extra", []):
        more = batch.extra[name]
        texts, of, content = (
            torch.cat([texts, more.embeddings]),
            torch.cat([of, more.owner]),
            torch.cat([content, more.content]),
        )
        negatives = torch.cat([negatives, torch.full((len(more.owner),), name == "negatives")])
    out = batch.weight == 0
    dead = out[of]
    for number, name in enumerate(list(batch.views)[1:]):
        if name in batch.present:
            dead = dead.clone()
            dead[number * len(batch) : (number + 1) * len(batch)] |= ~batch.present[name]
    own = (torch.arange(len(batch))[:, None] == of) & ~negatives
    counts = ~(out[:, None] | dead) & ((batch.content[:, None] != content) | own)
    right = own if label is None else own | (batch.labels[label][:, None] == batch.labels[label][of]) & ~negatives
    right = right & counts
    scores = scale(parameters) * anchors @ texts.T
    some = right.any(1)
    forward = total((lse(scores, counts).where(some, 0)[:, None] - scores), right) / right.sum(1).clamp_min(1)
    if settings.get("direction") == "forward":
        return batch.mean(forward, some)
    some_back = right.any(0)
    back = total((lse(scores.T, counts.T).where(some_back, 0)[:, None] - scores.T), right.T) / right.sum(0).clamp_min(1)
    mine = own & counts
    home = total(back.expand(own.shape), mine) / mine.sum(1).clamp_min(1)
    return batch.mean(forward, some) / 2 + batch.mean(home, mine.any(1)) / 2


def himulcon(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Zhang et al. 2022: SupCon where the first l levels agree, for each l."""
    s = stack(batch)
    scores = scale(parameters) * s.anchors @ s.candidates.T
    levels = batch.labels["levels"]
    depth = levels.shape[1]
    weights = settings.get("weights") or [2 ** (1 / (depth - level)) for level in range(depth)]
    loss = torch.zeros((), dtype=scores.dtype)
    for level, weight in enumerate(weights):
        path = levels[s.sample][:, None, : level + 1] == levels[s.of][None, :, : level + 1]
        positives = (path.all(2) | s.own) & s.counts
        gap = lse(scores, s.counts).where(s.counts.any(1), 0)[:, None] - scores
        losses = total(gap, positives) / positives.sum(1).clamp_min(1)
        loss = loss + weight / depth * s.mean(batch, losses, positives.any(1))
    return loss


def rince(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Hoffmann et al. 2022: rank r against itself, all coarser ranks and the negatives."""
    s = stack(batch)
    levels = batch.labels["levels"]
    depth = levels.shape[1]
    agree = (levels[s.sample][:, None] == levels[s.of][None]).long().cumprod(2).sum(2)
    rank = (depth - agree).where(~s.own, 0)  # 0 the nearest, `depth` for negatives
    loss = torch.zeros((), dtype=s.anchors.dtype)
    for r in range(depth):
        near = (scale(parameters) / settings.get("growth", 1.5) ** r * s.anchors @ s.candidates.T).exp()
        own, rest = s.counts & (rank == r), s.counts & (rank >= r)
        some = own.any(1)
        ratio = total(near, own).where(some, 1) / total(near, rest).where(some, 1)
        loss = loss + s.mean(batch, -ratio.log(), some)
    return loss


def multi_label(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """SupCon with the overlap of tag sets as the weight of a positive."""
    s = stack(batch)
    tags = batch.labels["tags"].bool()
    rows, columns = tags[s.sample][:, None], tags[s.of][None]
    shared = (rows & columns).sum(2).double()
    if settings.get("overlap", "jaccard") == "jaccard":
        overlap = shared / (rows | columns).sum(2).clamp_min(1)
    else:
        overlap = shared / rows.sum(2).clamp_min(1)
    overlap = overlap.where(overlap >= settings.get("threshold", 0), 0).masked_fill(s.own, 1)
    scores = scale(parameters) * s.anchors @ s.candidates.T
    gap = lse(scores, s.counts).where(s.counts.any(1), 0)[:, None] - scores
    mass = total(overlap, s.counts)
    return s.mean(batch, total(overlap * gap, s.counts) / mass.where(mass > 0, 1), mass > 0)


def with_prototypes(s: Stack, prototypes: Tensor) -> Stack:
    """The same with prototypes, which belong to no sample, as further candidates."""
    alive = s.valid.any(1)[:, None].expand(-1, len(prototypes))
    of = torch.cat([s.of, torch.full((len(prototypes),), -1)])
    more = torch.cat([s.counts, alive], 1), torch.cat([s.valid, alive], 1)
    return Stack(s.anchors, torch.cat([s.candidates, prototypes]), s.sample, of, *more, s.views)


def bcl(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Zhu et al. 2022: a mean over each class's embeddings and prototype in the denominator."""
    number = settings["classes"]
    s = with_prototypes(stack(batch), normalize(parameters["prototypes.vectors"], dim=1))
    near = (scale(parameters) * s.anchors @ s.candidates.T).exp()
    label = batch.labels["class"]
    kind = torch.cat([label[s.of[s.of >= 0]], torch.arange(number)])
    denominator = torch.zeros(len(s.anchors), dtype=near.dtype)
    for y in range(number):
        members = (s.valid & (kind == y)).sum(1)
        denominator = denominator + total(near, s.counts & (kind == y)) / members.clamp_min(1)
    positives = s.counts & (s.own | (label[s.sample][:, None] == kind))
    some = positives.any(1)
    gap = -(near / denominator.where(some, 1)[:, None]).log()
    return s.mean(batch, total(gap, positives) / positives.sum(1).clamp_min(1), some)


def paco(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Cui et al. 2021: centres by inner product without temperature; samples weigh alpha, the own centre 1."""
    centres = parameters["prototypes.vectors"]
    plain = stack(batch)
    s = with_prototypes(plain, centres)
    logits = torch.cat([scale(parameters) * plain.anchors @ plain.candidates.T, plain.anchors @ centres.T], 1)
    label = batch.labels["class"]
    kind = torch.cat([label[plain.of], torch.arange(len(centres))])
    positives = s.counts & (s.own | (label[s.sample][:, None] == kind))
    weight = positives * torch.ones(len(s.of), dtype=logits.dtype).where(s.of < 0, settings.get("alpha", 0.05))
    gap = lse(logits, s.counts).where(s.counts.any(1), 0)[:, None] - logits
    mass = weight.sum(1)
    return s.mean(batch, (weight * gap).sum(1) / mass.where(mass > 0, 1), mass > 0)


def kcl(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Kang et al. 2021: own views and the k positives with the largest lots."""
    s = stack(batch)
    names, count = list(batch.views), len(batch)
    keys = randomness.keys_of(batch.ids)
    rows = []
    for first, row in enumerate(names):
        blocks = []
        for second, column in enumerate(names):
            pair = f"{row} {column}" if first <= second else f"{column} {row}"
            seed = settings.get("seed", 0) * 100_003 + sum(ord(c) * (n + 1) for n, c in enumerate(pair))
            lots = randomness.uniform(seed, batch.clock.step, keys[:, None], keys[None], dtype=torch.float64)
            blocks.append(lots if first <= second else lots.T)
        rows.append(torch.cat(blocks, 1))
    lots = torch.cat(rows)
    others = s.counts & s.of_class(batch.labels["class"]) & ~s.own
    k = settings["k"]
    price = torch.cat([lots.masked_fill(~others, -1), torch.full((len(names) * count, k), -1.0)], 1).topk(k, 1)
    chosen = others & (lots >= price.values[:, -1:]) if k else torch.zeros_like(others)
    positives = chosen | s.own & s.counts
    scores = scale(parameters) * s.anchors @ s.candidates.T
    gap = lse(scores, s.counts).where(s.counts.any(1), 0)[:, None] - scores
    return s.mean(batch, total(gap, positives) / positives.sum(1).clamp_min(1), positives.any(1))


def multi_similarity(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Wang et al. 2019: mining, then both weighted log-sums; the mean over all anchors."""
    s = stack(batch)
    scores = s.anchors @ s.candidates.T
    same = s.of_class(batch.labels["class"])
    positives, negatives = s.counts & same, s.counts & ~same
    alpha, beta, base = settings.get("alpha", 2.0), settings.get("beta", 50.0), 0.5
    if (epsilon := settings.get("epsilon", 0.1)) is not None:
        fixed = scores.detach()
        far = fixed.masked_fill(~positives, torch.inf).amin(1, keepdim=True)
        near = fixed.masked_fill(~negatives, -torch.inf).amax(1, keepdim=True)
        positives, negatives = positives & (fixed < near + epsilon), negatives & (fixed > far - epsilon)
    pull = (1 + total((-alpha * (scores - base)).exp(), positives)).log() / alpha
    push = (1 + total((beta * (scores - base)).exp(), negatives)).log() / beta
    return s.mean(batch, pull + push, (batch.weight > 0)[s.sample])


def hiprbert(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Cai et al. 2023: multi-similarity on each level, whose base grows with the level."""
    s = stack(batch)
    scores = s.anchors @ s.candidates.T
    labels = batch.labels["levels"]
    count = labels.shape[1]
    alpha, beta = settings.get("alpha", 2.0), settings.get("beta", 50.0)
    losses = torch.zeros(len(scores), dtype=torch.float64)
    for level in range(count):
        base = settings["bases"][level] if "bases" in settings else (level + 1) / (count + 1)
        shared = (labels[:, None, : level + 1] == labels[None, :, : level + 1]).all(2)[s.sample][:, s.of] | s.own
        pull = (1 + total((-alpha * (scores - base)).exp(), s.counts & shared)).log() / alpha
        push = (1 + total((beta * (scores - base)).exp(), s.counts & ~shared)).log() / beta
        losses = losses + (pull + push) / count
    return s.mean(batch, losses, (batch.weight > 0)[s.sample])


def circle(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Sun et al. 2020, eq. 6."""
    s = stack(batch)
    scores = s.anchors @ s.candidates.T
    same = s.of_class(batch.labels["class"])
    positives, negatives = s.counts & same, s.counts & ~same
    m, gamma = settings.get("margin", 0.25), settings.get("gamma", 80.0)
    some = positives.any(1) & negatives.any(1)
    wide = (1 + m - scores.detach()).clamp_min(0), (scores.detach() + m).clamp_min(0)
    pull = total((-gamma * wide[0] * (scores - (1 - m))).exp(), positives)
    push = total((gamma * wide[1] * (scores - m)).exp(), negatives)
    return s.mean(batch, (1 + pull * push).log(), some)


def npair(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Sohn 2016: log(1 + sum exp(negative - positive)), and the squared lengths."""
    first, second = batch.views.values()
    scores = first @ second.T
    keep = ~batch.not_negative
    if (label := settings.get("label", "class")) is not None:
        keep = keep & (batch.labels[label][:, None] != batch.labels[label])
    rest = total((scores - scores.diagonal()[:, None]).exp(), keep)
    length = first.square().sum(1) + second.square().sum(1)
    return batch.mean((1 + rest).log() + settings.get("l2", 0.002) / 2 * length)


def proxy_nca(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Movshovitz-Attias et al. 2017: the distances to own proxies against those to the others', or to all."""
    proxies = normalize(parameters["proxies.vectors"], dim=1)
    kind = torch.arange(len(proxies)) // settings.get("per_class", 1)
    losses = []
    for view in batch.views.values():
        near = (-scale(parameters) * (view[:, None] - proxies).square().sum(2)).exp()
        own = batch.labels["class"][:, None] == kind
        rest = near if settings.get("denominator") == "all" else near.masked_fill(own, 0)
        losses.append(batch.mean(-(total(near, own) / rest.sum(1)).log()))
    return torch.stack(losses).mean()


def proxy_anchor(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Kim et al. 2020."""
    proxies = normalize(parameters["proxies.vectors"], dim=1)
    kind = torch.arange(len(proxies)) // settings.get("per_class", 1)
    points, label = torch.cat(list(batch.views.values())), batch.labels["class"].repeat(len(batch.views))
    alive = (batch.weight > 0).repeat(len(batch.views))
    scores = proxies @ points.T
    own = kind[:, None] == label
    alpha, delta = settings.get("alpha", 32.0), 0.1
    present = (own & alive).any(1)
    pull = (1 + total((-alpha * (scores - delta)).exp(), own & alive)).log()
    push = (1 + total((alpha * (scores + delta)).exp(), ~own & alive)).log()
    return pull[present].sum() / present.sum().clamp_min(1) + push.mean()


def margin_softmax(batch: Batch, parameters: Parameters, settings: Settings, angle: bool) -> Tensor:
    """Wang et al. 2018, eq. 4; Deng et al. 2019, eq. 3: cross-entropy with one changed logit."""
    vectors, label = normalize(parameters["proxies.vectors"], dim=1), batch.labels["class"]
    margin = settings.get("margin", 0.5 if angle else 0.35)
    losses = []
    for view in batch.views.values():
        cosine = view @ vectors.T
        own = cosine.gather(1, label[:, None])
        if angle:
            theta = own.acos()
            own = torch.where(theta + margin < torch.pi, (theta + margin).cos(), own - margin * math.sin(margin))
        else:
            own = own - margin
        logits = settings.get("scale", 64.0) * cosine.scatter(1, label[:, None], own)
        losses.append(batch.mean(cross_entropy(logits, label, reduction="none")))
    return torch.stack(losses).mean()


def cosface(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    return margin_softmax(batch, parameters, settings, angle=False)


def arcface(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    return margin_softmax(batch, parameters, settings, angle=True)


def gated_subspaces(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Wu et al. 2024: every candidate through the gate of every anchor."""
    label = batch.labels[settings.get("label", "class")].view(len(batch), -1)
    mean = parameters["vectors.weight"][label].mean(1)
    hidden = linear(mean, parameters["gate.0.weight"], parameters["gate.0.bias"]).relu()
    gates = linear(hidden, parameters["gate.2.weight"], parameters["gate.2.bias"]).sigmoid()
    first, second = batch.views.values()
    loss = torch.zeros((), dtype=first.dtype)
    for anchors, candidates in ((first, second), (second, first)):
        left = normalize(gates * anchors, dim=1)[:, None]
        right = normalize(gates[:, None] * candidates, dim=2)
        logits = scale(parameters) * (left * right).sum(2)
        alive = batch.weight > 0
        losses = lse(logits, ~batch.excluded).where(alive, 0) - logits.diagonal()
        loss = loss + batch.mean(losses) / 2
    return loss


def unicl(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    return multi_positive(batch, parameters, settings, "class")


REFERENCES: dict[str, Reference] = {
    "supcon": Reference(supcon, [{}, {"form": "in"}, {"extra": ["positives"]}], extra=("positives",)),
    "sincere": Reference(sincere),
    "soft-nearest-neighbour": Reference(soft_nearest_neighbour),
    "multi-positive": Reference(
        multi_positive,
        [
            {},
            {"extra": ["positives", "negatives"]},
            {"extra": ["positives", "negatives"], "label": "class"},
            {"direction": "forward"},
        ],
        views=("a", "b", "c"),
        extra=("positives", "negatives"),
        missing=True,
    ),
    "unicl": Reference(unicl),
    "himulcon": Reference(himulcon, [{}, {"weights": [0.3, 1.0]}]),
    "rince": Reference(rince, [{}, {"growth": 1.0}]),
    "multi-label": Reference(multi_label, [{}, {"overlap": "containment", "threshold": 0.5}]),
    "bcl": Reference(bcl, [{"classes": 9}]),
    "paco": Reference(paco, [{"classes": 9}, {"classes": 4, "alpha": 0.7}]),
    "kcl": Reference(kcl, [{"k": 2, "seed": 3}, {"k": 0}]),
    "multi-similarity": Reference(multi_similarity, [{}, {"epsilon": None, "beta": 10.0}]),
    "hiprbert": Reference(hiprbert, [{}, {"bases": [-0.2, 0.6], "alpha": 5.0, "beta": 10.0}]),
    "circle": Reference(circle, [{}, {"gamma": 20.0, "margin": 0.4}]),
    "npair": Reference(npair, [{}, {"label": None, "l2": 0.1}]),
    "proxy-nca": Reference(proxy_nca, [{"classes": 9}, {"classes": 4, "per_class": 2, "denominator": "all"}]),
    "proxy-anchor": Reference(proxy_anchor, [{"classes": 9, "alpha": 4.0}, {"classes": 4, "per_class": 2}]),
    "cosface": Reference(cosface, [{"classes": 9}, {"classes": 3, "scale": 10.0, "margin": 0.1}]),
    "arcface": Reference(arcface, [{"classes": 9, "scale": 8.0, "margin": 0.2}, {"classes": 3, "margin": 1.2}]),
    "gated-subspaces": Reference(gated_subspaces, [{"classes": 9}, {"label": "levels", "classes": 16, "hidden": 3}]),
}
