"""ClusterNS: clusters of the running model supply hard negatives and tell which negatives are false.

    c(i)   = the centre most similar to a_i,   h_i = the second most similar
    L_cl   = logsumexp( l_ij, <a_i, h_j> / tau + [i = j] log w  for all j ) - l_ii,           l_ij = <a_i, b_j> / tau
    L_bml  = 1/n_i sum_{j != i, c(j) = c(i)} [ max(0, d_ij + alpha) + max(0, -d_ij - beta) ],   d_ij = s_ij - s_ii
    loss_i = L_cl + mu L_bml
    centre_k <- unit( m centre_k + (1 - m) mean of the a_i with c(i) = k in the global batch )          after the loss

Deng et al. 2023, "Clustering-Aware Negative Sampling for Unsupervised Sentence Representation": samples of one cluster
are false negatives, which shall be less alike than the own pair by alpha at least and by beta at most; n_i is the
number of candidates. The centres are the same on all workers, have no gradient, and are chosen once, from the first
batch that holds as many samples and whose mean cosine of all pairs is not above `start`: a sample, then always the one
least similar to the last. Until then the loss is InfoNCE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import one_hot

from cl.engine import moments
from cl.engine.collectives import Layout, Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.engine.randomness import keys_of
from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse, row_sum
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs

_HARD, _CLUSTER = "hard centre", "online cluster"


class ClusterNSConfig(ScaledConfig):
    temperature: Scheduled = Field(0.05, description="initial temperature; scores are divided by it")
    clusters: int = Field(128, ge=2, description="number of centres")
    momentum: float = Field(0.99, ge=0, le=1, description="m of the centres")
    start: float = Field(0.4, ge=-1, le=1, description="mean cosine of all pairs from which clusters are formed")
    hard_weight: float = Field(1.0, gt=0, description="w, of the own hard negative in the sum")
    margin_weight: float = Field(1e-4, ge=0, description="mu, of the term on false negatives")
    alpha: float = Field(0.2, description="least distance of false negatives from the own pair")
    beta: float = Field(0.5, description="greatest distance of false negatives from the own pair")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")

    @model_validator(mode="after")
    def _ordered(self) -> ClusterNSConfig:
        if self.alpha > self.beta:
            raise ValueError(f"alpha ({self.alpha}) must not be more than beta ({self.beta})")
        return self


@OBJECTIVES.register(
    "clusterns",
    "k-means along with training: other centres as hard negatives, a margin band for samples of one cluster",
    paper="Clustering-Aware Negative Sampling for Unsupervised Sentence Representation",
)
class ClusterNS(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = ClusterNSConfig
    state = ("prototypes",)
    centres: Tensor
    begun: Tensor

    def __init__(self, config: ClusterNSConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None
        self.config = config
        self.register_buffer("centres", torch.zeros(config.clusters, config.dimensions))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def labels(self) -> Sequence[str]:
        return [_CLUSTER]

    def derive(self, pairs: Pairs, layout: Layout) -> Pairs:
        """The batch with the cluster of each sample (-1 before there are any), and its hard negative as a view."""
        pairs = super().derive(pairs, layout)
        first = next(iter(pairs.views))
        if not self.begun:
            return replace(pairs, labels={**pairs.labels, _CLUSTER: torch.full_like(pairs.weights().long(), -1)})
        nearest = self.nearest(pairs, first)
        views = {**pairs.views, _HARD: self.centres.to(pairs.dtype)[nearest[:, 1]]}
        present = {**pairs.present, **({_HARD: pairs.present[first]} if first in pairs.present else {})}
        return replace(pairs, views=views, present=present, labels={**pairs.labels, _CLUSTER: nearest[:, 0]})

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        hard = [_HARD] if _HARD in views else []
        return [(views[0], name) for name in (views[1], *self.extra, *hard)]

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        first, second = list(s.views)[:2]
        return {("own", first): s.own(first, second)}

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        if t.column_view == _HARD:
            return {"lse": row_lse(logits + math.log(self.config.hard_weight) * t.own.to(logits))}
        if t.columns.role == "negative":
            return {"lse": row_lse(logits)}
        apart = t.scores - t.row("own")
        band = (apart + self.config.alpha).relu() + (-apart - self.config.beta).relu()
        together = (t.row(_CLUSTER) == t.column(_CLUSTER)) & (t.row(_CLUSTER) >= 0)
        return {
            "lse": row_lse(logits),
            "band": row_sum(band, over="negatives", mask=together),
            "count": row_sum(torch.ones_like(logits)),
        }

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        both = s.valid(first, second)
        loss = s["lse", first] - self.temperature() * s.own(first, second)
        return [
            Term(loss, both),
            Term(s["band", first] / s["count", first].clamp_min(1), both, factor=self.config.margin_weight),
        ]

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        outcome = super().forward(pairs, workers)
        if self.training and torch.is_grad_enabled():
            first, second = list(self.view_names or pairs.views)[:2]
            if self.begun:
                self._follow(pairs, first, workers)
            elif self._ready(pairs, first, second, workers):
                self._begin(pairs, first, workers.layout(len(pairs), pairs.device))
        return outcome

    def nearest(self, pairs: Pairs, view: str) -> Tensor:
        """[B, 2]: the two centres most similar to each sample."""
        rows = pairs.view(view).detach().to(pairs.dtype).where((pairs.view_weights(view) > 0)[:, None], 0)
        return (rows @ self.centres.to(pairs.dtype).T).topk(2, 1).indices

    @torch.no_grad()
    def _ready(self, pairs: Pairs, first: str, second: str, workers: Workers) -> bool:
        """Whether the batch holds enough samples, and the mean cosine of all its pairs is low enough."""
        counted = [(pairs.view_weights(view) > 0).to(pairs.dtype) for view in (first, second)]
        means = [
            moments.mean(pairs.view(view).to(pairs.dtype), count, workers)
            for view, count in zip((first, second), counted, strict=True)
        ]
        enough = workers.all_reduce(counted[0].sum()) >= self.config.clusters
        return bool(enough & (means[0] @ means[1] <= self.config.start))

    @torch.no_grad()
    def _begin(self, pairs: Pairs, view: str, layout: Layout) -> None:
        """Choose centres among the samples of all workers: the one with the lowest id, then always the farthest."""
        place = torch.arange(layout.local.start, layout.local.stop, device=pairs.device)
        keys = layout.gather(place if pairs.ids is None else keys_of(pairs.ids))
        alive = layout.gather(pairs.view_weights(view)) > 0
        rows, keys = layout.gather(pairs.view(view).to(pairs.dtype))[alive], keys[alive]
        free = torch.ones_like(keys, dtype=torch.bool)
        last = int(keys.argmin())
        chosen = [last]
        for _ in range(1, self.config.clusters):
            free[last] = False
            last = int((rows @ rows[last]).masked_fill(~free, torch.inf).argmin())
            chosen.append(last)
        self.centres.copy_(unit(rows[chosen]))
        self.begun.fill_(True)

    @torch.no_grad()
    def _follow(self, pairs: Pairs, view: str, workers: Workers) -> None:
        """Move every centre that has members in the global batch."""
        alive = (pairs.view_weights(view) > 0)[:, None]
        members = one_hot(self.nearest(pairs, view)[:, 0], self.config.clusters).to(pairs.dtype) * alive
        sums = workers.all_reduce(members.T @ pairs.view(view).to(pairs.dtype).where(alive, 0))
        counts = workers.all_reduce(members.sum(0))[:, None]
        centres, momentum = self.centres.to(sums), self.config.momentum
        moved = unit(momentum * centres + (1 - momentum) * sums / counts.clamp_min(1))
        self.centres.copy_(torch.where(counts > 0, moved, centres))
