"""Supervised contrastive learning: every sample of the anchor's class is a positive.

    out:  loss_i = logsumexp_{a in A(i)} l_ia - 1/|P(i)| sum_{p in P(i)} l_ip
    in:   loss_i = logsumexp_{a in A(i)} l_ia - log( 1/|P(i)| sum_{p in P(i)} exp l_ip ),     l_ij = <z_i, z_j> / tau

Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2 and 3 (the paper finds `out` better). i runs over the
embeddings of all views; A(i) are all embeddings but i itself, P(i) those of A(i) of the same class, the sample's own
other views among them. With unique labels and two views it is NT-Xent; with one view it is the metric-learning form.
Anchors without a positive have no loss. A queue or a momentum encoder, as in SuMoCo-type systems, is added by
`teachers` and `views` of the training config.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.labelled import ScaledLabelledConfig, ScaledLabelledObjective, each_anchor


class SupConConfig(ScaledLabelledConfig):
    form: Literal["out", "in"] = Field("out", description="whether the mean over positives is outside of the log or in")


@OBJECTIVES.register(
    "supcon",
    "softmax over all samples of all views, all of the anchor's class as positives",
    paper="Supervised Contrastive Learning",
)
class SupCon(ScaledLabelledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = SupConConfig

    def __init__(self, config: SupConConfig) -> None:
        super().__init__(config)
        self.form = config.form

    def tile(self, t: Tile) -> Reductions:
        logits, positives = self.temperature() * t.scores, self.positives(t)
        agree = self.sum if self.form == "out" else self.lse
        return {
            "all": self.lse(t, logits),
            "agree": agree(t, logits, mask=positives),
            "count": self.sum(t, positives.to(logits)),
        }

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            count = s["count", view].clamp_min(1)
            agree = s["agree", view] / count if self.form == "out" else s["agree", view] - count.log()
            return s["all", view] - agree, s["count", view] > 0

        return each_anchor(s, loss)
