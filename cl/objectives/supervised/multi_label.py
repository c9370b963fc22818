"""Several tags a sample: positives weighted by how many tags two samples share.

    J_ij   = |T_i n T_j| / |T_i u T_j|, 0 below `threshold`, 1 for the sample's own other views
    loss_i = logsumexp_{a in A(i)} l_ia - sum_p J_ip l_ip / sum_p J_ip,                          l_ij = <z_i, z_j> / tau

SupCon (Khosla et al. 2020, eq. 2) with the Jaccard similarity of the label sets in the place of the class indicator,
as in Lin et al. 2023, "An Effective Deployment of Contrastive Learning in Multi-label Text Classification" (the JSCL
idea), normalised so that the weights of an anchor's positives sum to one. `overlap: containment` divides by |T_i|
instead of the union; `threshold: 1` keeps equal tag sets alone. Tags are [B, C] of 0 and 1; with one tag a sample it
is SupCon. A sample without tags has its own other views as positives.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, column_sum, row_sum
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.labelled import ScaledLabelledConfig, ScaledLabelledObjective, each_anchor


class MultiLabelConfig(ScaledLabelledConfig):
    label: str = Field("tags", description="the label, [B, C] of 0 and 1: which tags a sample has")
    overlap: Literal["jaccard", "containment"] = Field(
        "jaccard", description="shared tags over those of either sample, or over the anchor's own"
    )
    threshold: float = Field(0.0, ge=0, le=1, description="an overlap below this counts as none")


@OBJECTIVES.register(
    "multi-label",
    "SupCon for tags: positives weighted by the Jaccard similarity of two samples' tags",
    paper="An Effective Deployment of Contrastive Learning in Multi-label Text Classification",
)
class MultiLabel(ScaledLabelledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = MultiLabelConfig
    needs = ("tags",)

    def __init__(self, config: MultiLabelConfig) -> None:
        super().__init__(config)
        self.jaccard, self.threshold = config.overlap == "jaccard", config.threshold

    def overlap(self, t: Tile) -> tuple[Tensor, Tensor]:
        """[R, C] for rows as anchors, and for columns as anchors."""
        own = t.positive.to(t.scores)
        if t.columns.role == "negative" or self.label not in t.columns.meta:
            return own, own
        rows, columns = t.rows.meta[self.label].to(t.scores), t.columns.meta[self.label].to(t.scores)
        shared = rows @ columns.T
        sizes = rows.sum(1)[:, None], columns.sum(1)[None]
        union = sizes[0] + sizes[1] - shared
        out = []
        for size in sizes:
            part = shared / (union if self.jaccard else size.expand_as(shared)).clamp_min(1)
            out.append(part.where(part >= self.threshold, 0).where(~t.positive, own))
        return out[0], out[1]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        by_row, by_column = self.overlap(t)
        agree, total = [row_sum(by_row * logits)], [row_sum(by_row)]
        if self.columns_are_anchors(t):
            agree.append(column_sum(by_column * logits))
            total.append(column_sum(by_column))
        return {"all": self.lse(t, logits), "agree": agree, "total": total}

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            total, some = s["total", view], s["total", view] > 0
            return s["all", view] - s["agree", view] / total.where(some, 1), some

        return each_anchor(s, loss)
