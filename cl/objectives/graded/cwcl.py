"""CWCL: every pair is aligned as much as its samples are alike in a modality that is already good.

    forward   loss_i = -sum_j p_ij log softmax_j(l_ij),   p_ij = w_ij / sum_k w_ik,   w_ij = (1 + <t_i, t_j>) / 2
    backward  loss_i = -log softmax_i(l_ji)

Srinivasa et al. 2023, "CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss". t are the embeddings of
the pre-trained, locked modality: the first view itself, or the view that `teacher` names (embeddings of a frozen model
that the batch holds). Weights are constant in the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from cl.engine.rule import Comparison, Reductions, Samples, Term, Tile, row_lse, row_mean
from cl.objectives.base import OBJECTIVES
from cl.objectives.graded.soft import log_of
from cl.objectives.pairwise.directed import DirectedConfig, DirectedObjective


class CWCLConfig(DirectedConfig):
    teacher: str | None = Field(None, description="view whose similarities are the weights; default: the first view")


@OBJECTIVES.register(
    "cwcl",
    "cross-entropy with the similarities of a locked modality as weights of all pairs",
    paper="CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss",
)
class CWCL(DirectedObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = CWCLConfig
    needs = ("a locked view",)

    def __init__(self, config: CWCLConfig) -> None:
        super().__init__(config)
        self.teacher = config.teacher

    def comparisons(self, views: Sequence[str]) -> list[Comparison]:
        first, second = views[:2]
        teacher = self.teacher or first
        return [Comparison(first, second, {"teacher": (teacher, teacher)})]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        affinity, some = log_of((1 + t.channels["teacher"].detach()).clamp_min(0))
        return {"lse": self.each(row_lse, logits), "pull": row_mean(affinity, logits, mask=some)}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        share = 0.5 if self.both else 1.0
        terms = [Term(s["lse", first] - s["pull"], factor=share)]
        if self.both:
            terms.append(Term(s["lse", second] - self.temperature() * s.own(first, second), factor=share))
        return terms
