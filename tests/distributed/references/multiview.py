"""References of the objectives for many views, token-wise views and bags."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from cl.engine import randomness
from tests.distributed.references.batch import Batch, Reference

Parameters = Mapping[str, Tensor]
Settings = Mapping[str, Any]


def scale(parameters: Parameters) -> Tensor:
    return parameters["temperature.log_scale"].exp()


def has(batch: Batch, *views: str) -> Tensor:
    """[N]: not masked, and in possession of all of these views."""
    masks = [batch.present[view] for view in views if view in batch.present]
    return torch.stack([batch.weight > 0, *masks]).all(0)


def excluded(batch: Batch, rows: str, columns: str) -> Tensor:
    """[N, N]: what no row of one view may see of another."""
    itself = batch.own if rows == columns else torch.zeros_like(batch.own)
    return batch.excluded | itself | ~has(batch, rows)[:, None] | ~has(batch, columns)


def lse(values: Tensor, out: Tensor, dim: int = 1) -> Tensor:
    """log sum exp of what is not `out`; -inf, with a gradient of zeros, for none."""
    some = ~out.all(dim, keepdim=True)
    return values.masked_fill(out & some, -torch.inf).logsumexp(dim).where(some.squeeze(dim), -torch.inf)


def clip(batch: Batch, temper: Tensor, first: Tensor, second: Tensor, names: tuple[str, str]) -> Tensor:
    """Symmetric InfoNCE over the samples that have both views."""
    scores, out, both = temper * first @ second.T, excluded(batch, *names), has(batch, *names)
    rows, columns = lse(scores, out), lse(scores, out, 0)
    return batch.mean(((rows + columns) / 2 - scores.diagonal()).where(both, 0), both)


def pairwise(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Tian et al. 2020."""
    names = list(batch.views)
    pairs = (
        list(combinations(names, 2)) if settings.get("graph", "full") == "full" else [(names[0], n) for n in names[1:]]
    )
    pairs = settings.get("pairs", pairs)
    weights = settings.get("weights", [1 / len(pairs)] * len(pairs))
    losses = [clip(batch, scale(parameters), batch.views[u], batch.views[v], (u, v)) for u, v in pairs]
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()


def three_towers(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Kossen et al. 2023."""
    f, g, h = batch.views.values()

    def project(layer: str, x: Tensor) -> Tensor:
        return normalize(linear(x, parameters[f"{layer}.weight"], parameters[f"{layer}.bias"]), dim=1)

    temper = scale(parameters)
    return (
        clip(batch, temper, f, g, ("a", "b"))
        + clip(batch, temper, project("own.0", f), project("third.0", h), ("a", "c"))
        + clip(batch, temper, project("own.1", g), project("third.1", h), ("b", "c"))
    ) / 3


def mv_infonce(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Koromilas et al. 2025: one fraction a sample."""
    top = torch.zeros_like(batch.weight)
    bottom = torch.zeros_like(batch.weight)
    for u, first in batch.views.items():
        for v, second in batch.views.items():
            near = (scale(parameters) * first @ second.T).exp()
            bottom = bottom + near.masked_fill(excluded(batch, u, v), 0).sum(1)
            if u != v:
                top = top + near.diagonal()
    valid = has(batch, *batch.views)
    return batch.mean(-(top / bottom.where(valid, 1)).log(), valid)


def mv_dhel(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Koromilas et al. 2025: the product of the views' own denominators."""
    top, bottom = torch.zeros_like(batch.weight), torch.zeros_like(batch.weight)
    valid = has(batch, *batch.views)
    for u, v in combinations(batch.views, 2):
        top = top + (scale(parameters) * (batch.views[u] * batch.views[v]).sum(1)).exp()
    for view, value in batch.views.items():
        near = (
            (scale(parameters) * value @ value.T).exp().masked_fill(excluded(batch, view, view) | batch.own, 0).sum(1)
        )
        valid = valid & (near > 0)
        bottom = bottom + near.where(near > 0, 1).log()
    return batch.mean(bottom - top.log(), valid)


def poly_view(batch: Batch, parameters: Parameters, how: str) -> Tensor:
    """Shidani et al. 2024."""
    names, temper = list(batch.views), scale(parameters)
    rest = {
        v: sum(
            (temper * batch.views[v] @ batch.views[w].T).exp().masked_fill(excluded(batch, v, w) | batch.own, 0).sum(1)
            for w in names
        )
        for v in names
    }
    parts = []
    for u in names:
        chances = []
        for v in names:
            if u != v:
                own = (temper * (batch.views[u] * batch.views[v]).sum(1)).exp()
                chances.append(own / (own + rest[v]))
        chance = torch.stack(chances)
        parts.append(-chance.log().mean(0) if how == "geometric" else -chance.mean(0).log())
    return batch.mean(torch.stack(parts).mean(0), has(batch, *names))


def poly_view_geometric(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    return poly_view(batch, parameters, "geometric")


def poly_view_arithmetic(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    return poly_view(batch, parameters, "arithmetic")


def poly_view_sufficient(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Shidani et al. 2024: the mean of the other views is the query."""
    names, temper = list(batch.views), scale(parameters)
    parts = []
    for u in names:
        others = torch.stack([batch.views[v] for v in names if v != u]).mean(0)
        own = (temper * (others * batch.views[u]).sum(1)).exp()
        rest = torch.zeros_like(own)
        for w in names:
            out = batch.excluded | batch.own | ~has(batch, w)
            rest = rest + (temper * others @ batch.views[w].T).exp().masked_fill(out, 0).sum(1)
        parts.append(-(own / (own + rest)).log())
    return batch.mean(torch.stack(parts).mean(0), has(batch, *names))


def symile(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Saporta et al. 2024, every anchor and every tuple one by one."""
    views = dict(batch.views)
    if settings.get("missing", "skip") == "learnt":
        complete = batch.weight > 0
        for view, there in batch.present.items():
            views[view] = torch.where(there[:, None], views[view], normalize(parameters[f"absent.{view}"], dim=0))
    else:
        complete = has(batch, *views)
    keys, alive = randomness.keys_of(batch.ids), torch.nonzero(complete)[:, 0].tolist()
    names, losses = list(views), []
    for place, anchor in enumerate(names):
        others = [view for view in names if view != anchor]
        tuples: list[tuple[int, tuple[int, ...]]] = []  # (which tuple it is, the sample of each member)
        for shuffle in range(settings.get("shuffles", 1)):
            after: list[dict[int, int]] = []
            for number in range(len(others)):
                seed = ((settings.get("seed", 0) * 1009 + shuffle) * 1009 + place) * 1009 + number
                lots = randomness.uniform(seed, batch.clock.step, keys, dtype=torch.float64).tolist()
                circle = sorted(alive, key=lambda i: lots[i])
                after.append(dict(zip(circle, circle[1:] + circle[:1], strict=True)))
            tuples += [(j, tuple(step[j] for step in after)) for j in alive]
        values = torch.zeros_like(batch.weight)
        for i in alive:

            def product(members: tuple[int, ...]) -> Tensor:
                value = views[anchor][i]  # noqa: B023
                for view, j in zip(others, members, strict=True):  # noqa: B023
                    value = value * views[view][j]
                return scale(parameters) * value.sum()

            own = product((i,) * len(others))
            logits = [own]
            for j, members in tuples:
                right = all(batch.content[m] == batch.content[i] for m in members)
                if j != i and not right:
                    logits.append(product(members))
            values[i] = torch.stack(logits).logsumexp(0) - own
        losses.append(batch.mean(values, complete))
    return torch.stack(losses).mean()


def late(batch: Batch, parameters: Parameters, pool: str, both: bool) -> Tensor:
    """Yao et al. 2021; Khattab and Zaharia 2020: one pair of samples at a time."""
    (first, x), (second, y) = batch.views.items()
    count = len(batch)

    def score(rows: Tensor, columns: Tensor) -> Tensor:
        best = (rows @ columns.T).max(1).values
        return best.mean() if pool == "mean" else best.sum()

    real = [[x[i][batch.tokens[first][i]] for i in range(count)], [y[i][batch.tokens[second][i]] for i in range(count)]]
    loss = torch.zeros((), dtype=x.dtype)
    orders = [(0, 1), (1, 0)] if both else [(0, 1)]
    for rows, columns in orders:
        grid = [torch.stack([score(real[rows][i], real[columns][j]) for j in range(count)]) for i in range(count)]
        scores = scale(parameters) * torch.stack(grid)
        alive = batch.weight > 0
        value = lse(scores, batch.excluded) - scores.diagonal()
        loss = loss + batch.mean(value.where(alive, 0)) / len(orders)
    return loss


def filip(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    return late(batch, parameters, settings.get("pool", "mean"), settings.get("direction", "both") == "both")


def colbert(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    return late(batch, parameters, settings.get("pool", "sum"), settings.get("direction", "forward") == "both")


def mil_nce(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Miech et al. 2020: bags one by one."""
    (anchor, x), *others = batch.views.items()
    texts = [value for _, value in others]
    of = [torch.arange(len(batch))] * len(others)
    content = [batch.content] * len(others)
    dead = [~has(batch, name) for name, _ in others]
    never = [torch.zeros(len(batch), dtype=torch.bool)] * len(others)
    for name in settings.get("extra", []):
        more = batch.extra[name]
        texts.append(more.embeddings)
        of.append(more.owner)
        content.append(more.content)
        dead.append((batch.weight == 0)[more.owner])
        never.append(torch.full((len(more.owner),), name == "negatives"))
    y, owner, holds, out, mined = torch.cat(texts), torch.cat(of), torch.cat(content), torch.cat(dead), torch.cat(never)
    own = (torch.arange(len(batch))[:, None] == owner) & ~mined
    counts = has(batch, anchor)[:, None] & ~out & ((batch.content[:, None] != holds) | own)
    right = own
    if (label := settings.get("label")) is not None:
        right = own | (batch.labels[label][:, None] == batch.labels[label][owner]) & ~mined
    near = (scale(parameters) * x @ y.T).exp()
    bag = near.masked_fill(~(right & counts), 0).sum(1)
    rest = near.masked_fill(~(counts & ~right), 0)
    below = bag + rest.sum(1)
    if settings.get("direction", "both") == "both":
        strangers = rest.masked_fill(mined, 0).sum(0)  # of each candidate, the anchors that are not its own
        below = below + strangers.expand(own.shape).masked_fill(~(own & counts), 0).sum(1)
    some = bag > 0
    return batch.mean(-(bag.where(some, 1) / below.where(some, 1)).log(), some)


def gram(batch: Batch, parameters: Parameters, settings: Settings) -> Tensor:
    """Cicchetti et al. 2025: the determinant of every tuple's Gram matrix."""
    names, count = settings.get("views", list(batch.views)), len(batch)
    anchor, *others = (batch.views[name] for name in names)
    rows = anchor[:, None].expand(count, count, -1)
    members = [other[None].expand(count, count, -1) for other in others]
    points = torch.stack([rows, *members], 2)
    volumes = torch.linalg.det(points @ points.mT).clamp_min(1e-30).sqrt()
    logits = -scale(parameters) * volumes
    out = batch.excluded | ~has(batch, names[0])[:, None] | ~has(batch, *names[1:])
    valid = has(batch, *names)
    value = (lse(logits, out) + lse(logits, out, 0)) / 2 - logits.diagonal()
    return batch.mean(value.where(valid, 0), valid)


VIEWS = ("a", "b", "c")
REFERENCES: dict[str, Reference] = {
    "pairwise": Reference(
        pairwise,
        [{}, {"graph": "core"}, {"pairs": [("c", "a"), ("b", "c")], "weights": [0.3, 2.0]}],
        views=VIEWS,
        missing=True,
    ),
    "three-towers": Reference(three_towers, views=VIEWS, missing=True),
    "mv-infonce": Reference(mv_infonce, views=VIEWS, missing=True),
    "mv-dhel": Reference(mv_dhel, views=VIEWS, missing=True),
    "poly-view-geometric": Reference(poly_view_geometric, views=VIEWS, missing=True),
    "poly-view-arithmetic": Reference(poly_view_arithmetic, views=VIEWS, missing=True),
    "poly-view-sufficient": Reference(poly_view_sufficient, views=VIEWS, missing=True),
    "symile": Reference(
        symile,
        [{}, {"shuffles": 2, "seed": 4}, {"missing": "learnt", "views": ["a", "b", "c"]}],
        views=VIEWS,
        missing=True,
    ),
    "filip": Reference(filip, views=("a_tokens", "b_tokens")),
    "colbert": Reference(colbert, views=("a_tokens", "b_tokens")),
    "mil-nce": Reference(
        mil_nce,
        [
            {},
            {"extra": ["positives", "negatives"]},
            {"extra": ["positives", "negatives"], "label": "class"},
            {"direction": "forward"},
        ],
        views=VIEWS,
        extra=("positives", "negatives"),
        missing=True,
    ),
    "gram": Reference(gram, [{"views": ["a", "b"]}, {}], views=VIEWS, missing=True),
}
