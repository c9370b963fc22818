"""RINCE: positives in ranks, the nearer ones closer than the farther ones.

    loss_i = sum_{r=1..R} -log( sum_{p in P_r} exp(s_ip / tau_r) / sum_{a in P_r u ... u P_R u N} exp(s_ia / tau_r) )

Hoffmann et al. 2022, "Ranking Info Noise Contrastive Estimation: Boosting Contrastive Learning via Ranked Positives",
with the sum over positives inside of the log (RINCE-in). Ranks come from labels with levels: P_1 agrees with the
anchor on all levels (and holds the sample's own other views), P_r on all but the last r - 1, N on none. A pair of
each rank must be more alike than all pairs farther away in the taxonomy. tau_r = tau growth^(r - 1): coarser ranks may
be looser. A rank without positives has no loss; with one level it is SupCon's `in` form up to the log of the number of
positives.
"""

from __future__ import annotations

import torch
from pydantic import Field

from cl.engine.rule import Reductions, Samples, Term, Tile
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.hierarchical import HierarchyConfig, HierarchyObjective
from cl.objectives.supervised.labelled import ScaledLabelledConfig, ScaledLabelledObjective


class RinceConfig(HierarchyConfig, ScaledLabelledConfig):
    growth: float = Field(1.5, ge=1, description="by how much the temperature grows from one rank to the next coarser")


@OBJECTIVES.register(
    "rince",
    "positives in ranks by their distance in a taxonomy, each nearer than the next",
    paper="Ranking Info Noise Contrastive Estimation: Boosting Contrastive Learning via Ranked Positives",
)
class Rince(HierarchyObjective, ScaledLabelledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = RinceConfig

    def __init__(self, config: RinceConfig) -> None:
        super().__init__(config)
        self.growth = config.growth

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        found = {}
        nearer = torch.zeros_like(t.own)
        for rank, agree in enumerate(reversed(list(self.agreement(t)))):
            loose = logits / self.growth**rank
            found[f"rest {rank}"] = self.lse(t, loose, mask=~nearer)
            found[f"own {rank}"] = self.lse(t, loose, mask=agree & ~nearer)
            nearer = agree
        return found

    def finish(self, s: Samples) -> list[Term]:
        terms = []
        for rank in range(s.meta[self.label].shape[1]):
            for view in s.present:
                own = s[f"own {rank}", view]
                terms.append(
                    Term(s[f"rest {rank}", view] - own, s.valid(view) & own.isfinite(), factor=1 / len(s.present))
                )
        return terms
