"""SINCERE: supervised contrast whose denominator holds one positive and the negatives, not the other positives.

    loss_i = 1/|P(i)| sum_{p in P(i)} [ log( exp l_ip + sum_{n in N(i)} exp l_in ) - l_ip ],     l_ij = <z_i, z_j> / tau

Feeney and Hughes 2023, "SINCERE: Supervised Information Noise-Contrastive Estimation REvisited": in SupCon the other
positives of an anchor are in the denominator and repel it; here none does. P(i) and N(i) are the embeddings of all
views of the anchor's class (but itself) and of other classes. With unique labels and two views it is NT-Xent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, Tiler, column_sum, row_sum
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.labelled import ScaledLabelledConfig, ScaledLabelledObjective, each_anchor


@OBJECTIVES.register(
    "sincere",
    "SupCon without the repulsion among samples of one class",
    paper="SINCERE: Supervised Information Noise-Contrastive Estimation REvisited",
)
class Sincere(ScaledLabelledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = ScaledLabelledConfig

    def passes(self) -> Sequence[Tiler]:
        return [self.negatives, self.tile]

    def negatives(self, t: Tile) -> Reductions:
        return {"rest": self.lse(t, self.temperature() * t.scores, mask=~self.positives(t))}

    def tile(self, t: Tile) -> Reductions:
        logits, positives = self.temperature() * t.scores, self.positives(t)
        losses = [row_sum(torch.logaddexp(t.row("rest"), logits) - logits, mask=positives)]
        if self.columns_are_anchors(t):
            losses.append(column_sum(torch.logaddexp(t.column("rest"), logits) - logits, mask=positives))
        return {"loss": losses, "count": self.sum(t, positives.to(logits))}

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            return s["loss", view] / s["count", view].clamp_min(1), s["count", view] > 0

        return each_anchor(s, loss)
