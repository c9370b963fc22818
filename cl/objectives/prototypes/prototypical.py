"""Prototypical contrast: a sample against the prototypes of all classes, which are moving averages of their members.

    L   = mean_i [ logsumexp_c (e_i . p_c) / tau - (e_i . p_y(i)) / tau ]
    p_c <- normalise(m p_c + (1 - m) mean of the members' embeddings in the global batch)      after the loss

Li et al. 2021, "Prototypical Contrastive Learning of Unsupervised Representations", with classes given by a
label of the batch (clusters of an earlier model, web queries) instead of k-means once an epoch; the moving average and
its use across modalities (prototypes from texts, contrast of pictures: `prototype_view`) are those of CAPro (Qin et al.
2023, "CAPro: Webly Supervised Learning with Cross-Modality Aligned Prototypes"). A prototype that no sample has had yet
is no candidate, and its members have no loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse, row_sum
from cl.engine.side import Side
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class PrototypicalConfig(ScaledConfig):
    label: str = Field("class", description="the label of the batch with each sample's class, from 0")
    classes: int = Field(ge=2, description="number of classes")
    momentum: float = Field(0.999, ge=0, le=1, description="m of the prototypes")
    prototype_view: str | None = Field(None, description="the view whose means are the prototypes; default: the first")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


@OBJECTIVES.register(
    "prototypical",
    "a sample against class prototypes, moving averages of the members of one's own or another modality",
    paper="Prototypical Contrastive Learning of Unsupervised Representations",
)
class Prototypical(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = PrototypicalConfig
    compares = "one view with class labels, or two"
    needs = ("class labels",)
    state = ("prototypes",)
    prototypes: Tensor
    seen: Tensor

    def __init__(self, config: PrototypicalConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None
        self.label, self.momentum, self.prototype_view = config.label, config.momentum, config.prototype_view
        self.register_buffer("prototypes", torch.zeros(config.classes, config.dimensions))
        self.register_buffer("seen", torch.zeros(config.classes, dtype=torch.bool))

    def labels(self) -> Sequence[str]:
        return [self.label]

    def comparisons(self, views: Sequence[str]) -> Sequence[tuple[str, str]]:
        return [(views[0], "prototypes")]

    def constants(self, pairs: Pairs) -> list[Side]:
        classes = torch.arange(len(self.prototypes), device=self.prototypes.device)
        weight = self.seen.to(pairs.dtype)
        nobody = torch.full_like(classes, -1)
        known = {self.label: classes}
        return [Side("prototypes", self.prototypes.clone(), nobody, weight, meta=known, replicated=True)]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        own = t.row(self.label) == t.column(self.label)
        return {"lse": row_lse(logits), "own": row_sum(logits, mask=own), "known": row_sum(own.to(logits.dtype))}

    def finish(self, s: Samples) -> list[Term]:
        view = next(name for name, _ in s.statistics.items() if name[0] == "lse")[1]
        return [Term(s["lse", view] - s["own", view], s.valid(view) & (s["known", view] > 0))]

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        outcome = super().forward(pairs, workers)
        if self.training and torch.is_grad_enabled():
            self._follow(pairs, workers)
        return outcome

    @torch.no_grad()
    def _follow(self, pairs: Pairs, workers: Workers) -> None:
        view = self.prototype_view or next(iter(self.view_names or pairs.views))
        alive = pairs.view_weights(view) > 0
        members = one_hot(pairs.label(self.label), len(self.prototypes)).to(pairs.dtype) * alive[:, None]
        sums = workers.all_reduce(members.T @ pairs.view(view).to(pairs.dtype).where(alive[:, None], 0))
        counts = workers.all_reduce(members.sum(0))
        here = counts > 0
        means = sums / counts.clamp_min(1)[:, None]
        share = (self.momentum * self.seen.to(means))[:, None]  # the first members are the prototype
        moved = unit(share * self.prototypes.to(means) + (1 - share) * means)
        self.prototypes.copy_(torch.where(here[:, None], moved, self.prototypes.to(moved)))
        self.seen |= here
