"""Feature transformation on momentum contrast: positives are pushed apart, negatives of the queue are mixed.

    s_i  = <lambda q + (1 - lambda) k, lambda k + (1 - lambda) q> = <q_i, k_i> - 2 lambda (lambda - 1) (1 - <q_i, k_i>)
    n_j  = mu n_j + (1 - mu) n_p(j),  p a random cycle through the queue
    loss_i = logsumexp( s_i / tau, <q_i, n_j> / tau ) - s_i / tau

for embeddings of length 1; lambda = 1 + Beta(a, a) for each query, mu from Beta(b, b) for each key. Zhu et al. 2021,
"Improving Contrastive Learning by Visualizing Feature Transformation": harder positives, and more
diverse negatives. a = null or b = null leaves that part out. A mixture is no negative of a sample whose content either
of its parts holds. Needs the teacher's embeddings, as `cl.objectives.state.moco`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from cl.engine import randomness
from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.engine.side import Side
from cl.objectives.base import OBJECTIVES
from cl.objectives.state.moco import MoCo, MoCoConfig
from cl.pairs import Pairs


class FeatureTransformationConfig(MoCoConfig):
    extrapolation: int | None = Field(2, ge=1, description="a of the positives' Beta(a, a); null: as they are")
    interpolation: int | None = Field(2, ge=1, description="b of the negatives' Beta(b, b); null: as they are")
    seed: int = Field(0, description="of the shares and the cycle")


def beta(order: int, seed: int, step: int, counter: Tensor, dtype: torch.dtype) -> Tensor:
    """A number from Beta(order, order) for each counter: the middle one of 2 order - 1 even numbers."""
    draws = torch.arange(2 * order - 1, device=counter.device)
    return randomness.uniform(seed, step, counter[:, None], draws, dtype=dtype).sort(1).values[:, order - 1]


@OBJECTIVES.register(
    "feature-transformation",
    "momentum contrast with extrapolated positives and mixed negatives",
    paper="Improving Contrastive Learning by Visualizing Feature Transformation",
)
class FeatureTransformation(MoCo):
    """See the module's formula."""

    Config = FeatureTransformationConfig

    def __init__(self, config: FeatureTransformationConfig) -> None:
        super().__init__(config)
        self.config = config

    def constants(self, pairs: Pairs) -> list[Side]:
        sides, order = super().constants(pairs), self.config.interpolation
        return sides if order is None else [self._mixed(side, order, pairs.clock.step) for side in sides]

    def _mixed(self, side: Side, order: int, step: int) -> Side:
        """A queue whose keys are mixed with the next of the cycle."""
        places = torch.arange(len(side.sample), device=side.sample.device)
        chance = randomness.uniform(self.config.seed, step, places, places * 0 + 1, dtype=torch.float64)
        cycle = (chance + (side.weight == 0)).argsort()[: int((side.weight > 0).sum())]
        partner = places.clone()
        partner[cycle] = cycle.roll(1)
        share = beta(order, self.config.seed + 1, step, places, side.embeddings.dtype)[:, None]
        mixed = share * side.embeddings + (1 - share) * side.embeddings[partner]
        meta = {} if side.content is None else {"partner": side.content[partner]}
        return replace(side, embeddings=mixed, meta=meta)

    def tile(self, t: Tile) -> Reductions:
        logits, mask = self.temperature() * t.scores, None
        if "partner" in t.columns.meta and t.rows.content is not None:
            mask = (t.rows.content[:, None] != t.column("partner")).all(-1)
        return {"rest": row_lse(logits, "negatives", mask)}

    def finish(self, s: Samples) -> list[Term]:
        terms = []
        for query, key in self.queries(list(s.views)):
            own = s.own(query, key)
            if self.config.extrapolation is not None:
                share = 1 + beta(self.config.extrapolation, self.config.seed, s.clock.step, s.meta["key"], own.dtype)
                own = own - 2 * share * (share - 1) * (1 - own)
            own = self.temperature() * own
            terms.append(Term(torch.logaddexp(s["rest", query], own) - own, s.valid(query, key), 1 / self.directions))
        return terms
