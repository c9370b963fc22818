"""NT-Xent: both views are anchors, and both views of all other samples are negatives.

    loss_i = [ (logsumexp_{c != a_i} <a_i, c> / tau - l_ii) + (logsumexp_{c != b_i} <b_i, c> / tau - l_ii) ] / 2

c runs over the embeddings of both views of all samples but the anchor itself; l_ii = <a_i, b_i> / tau. Chen et al.
2020, "A Simple Framework for Contrastive Learning of Visual Representations", eq. 1. Unlike symmetric InfoNCE,
candidates of the anchor's own view count.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cl.engine.rule import Reductions, Samples, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import ScaledConfig, ScaledObjective


@OBJECTIVES.register(
    "ntxent",
    "InfoNCE over both views at once, negatives of the anchor's own view included (SimCLR)",
    paper="A Simple Framework for Contrastive Learning of Visual Representations",
)
class NTXent(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = ScaledConfig

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        first, second = views[:2]
        return [(first, second), (first, first), (second, second)]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        if t.row_view == t.column_view:
            return {"lse": row_lse(logits)}
        return {"lse": [row_lse(logits), column_lse(logits)]}

    def finish(self, s: Samples) -> Tensor:
        first, second = list(s.views)[:2]
        return (s["lse", first] + s["lse", second]) / 2 - self.temperature() * s.own(first, second)
