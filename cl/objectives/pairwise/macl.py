"""Model-aware contrastive learning: the temperature follows alignment, and easy pairs keep their gradient.

    tau    = tau_0 (1 + alpha (A - A_0)),   A = mean_i <a_i, b_i>, of the global batch, constant in the gradient
    loss_i = -sg[1 / (1 - P_i)] log P_i,    P_i = e(l_ii) / (e(l_ii) + sum over negatives of e(l_ij)),  l = <., .> / tau

Huang et al. 2023, "Model-Aware Contrastive Learning: Towards Escaping the Dilemmas". With x_i = log of the sum over
negatives - l_ii, -log P_i = softplus(x_i) and 1 - P_i = sigmoid(x_i), so the gradient of the loss is that of x_i:
decoupled contrastive learning at the temperature tau. It is computed so, which keeps it finite at any temperature.
Negatives are the other view of all other samples, and with `same_side` the anchor's own view too (SimCLR).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from cl.engine.collectives import Workers
from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.objectives.base import OBJECTIVES, Outcome
from cl.objectives.pairwise.directed import DirectedConfig, DirectedObjective
from cl.objectives.schedule import Scheduled
from cl.pairs import Pairs


class MACLConfig(DirectedConfig):
    temperature: Scheduled = Field(0.1, description="tau_0; scores are divided by tau")
    learn_temperature: bool = Field(False, description="train the log of the inverse of tau_0")
    alpha: float = Field(0.5, ge=0, le=1, description="how much the temperature follows alignment; 0: not at all")
    expected_alignment: float = Field(0.0, ge=-1, lt=1, description="A_0, the alignment at which tau is tau_0")
    same_side: bool = Field(False, description="other samples of the anchor's own view are negatives too")


@OBJECTIVES.register(
    "macl",
    "temperature that follows the alignment of the batch, and a weight that undoes the damping of easy pairs",
    paper="Model-Aware Contrastive Learning: Towards Escaping the Dilemmas",
)
class ModelAware(DirectedObjective):
    """See the module's formula. Parameters: the log of the inverse of tau_0, if it is trained."""

    Config = MACLConfig
    alignment: Tensor

    def __init__(self, config: MACLConfig) -> None:
        super().__init__(config)
        self.config = config
        self.register_buffer("alignment", torch.tensor(config.expected_alignment), persistent=False)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        first, second = (pairs.view(name).detach() for name in list(self.view_names or pairs.views)[:2])
        weight = pairs.weights()
        own = (first.to(pairs.dtype) * second.to(pairs.dtype)).sum(1).where(weight > 0, 0)
        aligned, total = workers.all_reduce(torch.stack([(weight * own).sum(), weight.sum()]))
        self.alignment = aligned / total.where(total > 0, 1)
        return super().forward(pairs, workers)

    def scale(self) -> Tensor:
        """1 / tau, for the alignment of this step's batch."""
        return self.temperature() / (1 + self.config.alpha * (self.alignment - self.config.expected_alignment))

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        first, second = views[:2]
        sides = [(first, first), (second, second)] if self.config.same_side else []
        return [(first, second), *sides, *((first, name) for name in self.extra)]

    def tile(self, t: Tile) -> Reductions:
        logits = self.scale() * t.scores
        if t.row_view == t.column_view:
            return {"rest": row_lse(logits)}
        return {"rest": self.each(row_lse, logits, over="negatives")}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        positive = self.scale() * s.own(first, second)
        anchors = self.anchors(s)
        terms = []
        for view in anchors:
            valid = s["rest", view].isfinite()
            x = s["rest", view].where(valid, 0) - positive
            # -logsigmoid(-x) / sigmoid(x) = 1 + exp(x) / 2 + O(exp(2 x)), where both underflow
            value = torch.where(x < -15, 1 + x.exp() / 2, -logsigmoid(-x) / x.clamp_min(-15).sigmoid())
            terms.append(Term(x + (value - x).detach(), valid, factor=1 / len(anchors)))
        return terms

    def measures(self) -> Mapping[str, Tensor]:
        return {"logit_scale": self.scale().detach(), "alignment": self.alignment}
