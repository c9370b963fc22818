"""ListMLE: the likelihood of the right order of the best k candidates (Plackett-Luce).

    loss_i = sum_{r = 1..k} [ log sum_{j not among the first r - 1} exp l_ij - l_i,pi(r) ],   y_i,pi(1) >= y_i,pi(2) ...

Xia et al. 2008, "Listwise Approach to Learning to Rank: Theory and Algorithm" (k = N), and Xia, Liu and Li 2009,
"Statistical Consistency of Top-k Ranking" (top k). y [B, N] is `pairs.targets[target]`, the relevance of every sample
of the global batch to each of this worker's; candidates of equal relevance keep the batch's order. A row takes part
with as many ranks as it has candidates; -inf ranks a candidate nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from cl.engine.collectives import Workers
from cl.engine.rule import Reductions, Samples, Term, Tile, Tiler, row_lse, row_sum, row_top
from cl.objectives.base import OBJECTIVES, Outcome
from cl.objectives.graded.soft_targets import target_of
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class ListMLEConfig(ScaledConfig):
    target: str = Field("soft", description="name of the relevances in the batch's targets")
    k: int = Field(5, ge=1, le=64, description="ranks whose order counts")


@OBJECTIVES.register(
    "listmle",
    "likelihood of the order of the k most relevant candidates",
    paper="Listwise Approach to Learning to Rank: Theory and Algorithm",
)
class ListMLE(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = ListMLEConfig
    needs = ("targets",)

    def __init__(self, config: ListMLEConfig) -> None:
        super().__init__(config)
        self.target, self.k = config.target, config.k
        self.local, self.start = config.exchange == "local", 0

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        # Places count from the first column: that of this worker where candidates are its own.
        self.start = workers.layout(len(pairs), pairs.device).local.start if self.local else 0
        return super().forward(pairs, workers)

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [(views[0], views[1])]

    def passes(self) -> list[Tiler]:
        return [self.order, self.tile]

    def order(self, t: Tile) -> Reductions:
        """First, which candidate has which rank."""
        return {"rank": row_top(target_of(t, self.target).to(t.scores.dtype), self.k, over="candidates")}

    def tile(self, t: Tile) -> Reductions:
        """Then, the score of each rank and the sum over the candidates that come after."""
        logits = self.temperature() * t.scores
        ranked = t.row("rank.index") == (t.columns.sample - self.start)[:, None]  # [R, C, k]
        scores = {f"score {r}": row_sum(logits, mask=ranked[:, :, r]) for r in range(self.k)}
        return {"rest": row_lse(logits, mask=~ranked.any(2)), **scores}

    def finish(self, s: Samples) -> list[Term]:
        first = next(iter(s.views))
        after, loss = s["rest", first], torch.zeros_like(s["rest", first])
        for r in reversed(range(self.k)):
            score, there = s[f"score {r}", first], s["rank", first][:, r].isfinite()
            after = after.logaddexp(score).where(there, after)
            loss = loss + (after - score).where(there, 0)
        return [Term(loss)]
