"""SwAV: the code of one view, an assignment to learnt prototypes, is predicted from the other views.

    q_v = Sinkhorn(z_v C^T)    balanced over the samples of the global batch, no gradient, for the first `assigned`
    views p_v = softmax(z_v C^T / tau) L   = mean over assigned views v and other views u of  mean_i - sum_k q_v,ik log
    p_u,ik

Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"; C has rows
of length 1. Further views (local crops) predict but are not assigned.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from cl.engine import moments
from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES
from cl.objectives.moment import MomentConfig, MomentObjective
from cl.pairs import Pairs


class SwAVConfig(MomentConfig):
    prototypes: int = Field(3000, ge=2, description="rows of C")
    temperature: float = Field(0.1, gt=0, description="tau of the predictions")
    epsilon: float = Field(0.05, gt=0, description="temperature of the assignments")
    iterations: int = Field(3, ge=1, description="of Sinkhorn's algorithm")
    assigned: int = Field(2, ge=1, description="views, from the first, whose assignments are predicted")


@OBJECTIVES.register(
    "swav",
    "balanced assignments of one view to learnt prototypes are predicted from the others",
    paper="Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
)
class SwAV(MomentObjective):
    """See the module's formula. Parameters: the prototypes C."""

    Config = SwAVConfig
    compares = "two or more views"
    state = ("prototypes",)
    memory = "batch x prototypes"

    def __init__(self, config: SwAVConfig) -> None:
        super().__init__(config)
        self.config = config
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, self.width))

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        rows = self.rows(pairs, workers)
        directions = unit(self.prototypes)
        scores = [unit(view) @ directions.T for view in rows.views]
        losses = []
        for v in range(self.config.assigned):
            code = moments.sinkhorn(
                scores[v].detach(), rows.weight, workers, self.config.epsilon, self.config.iterations
            )
            others = [score for u, score in enumerate(scores) if u != v]
            losses += [-(code * (score / self.config.temperature).log_softmax(1)).sum(1) for score in others]
        return Outcome(moments.replicated(rows.mean(torch.stack(losses).mean(0), workers), workers))
