"""HiPrBERT: pairs at different distances in a hierarchy must have different similarities.

    loss_i = 1/L sum_{l=1..L} [ 1/alpha log( 1 + sum_{j in P_l(i)}     exp(-alpha (s_ij - base_l)) )
                              + 1/beta  log( 1 + sum_{j not in P_l(i)} exp( beta  (s_ij - base_l)) ) ]

Cai et al. 2023, "Hierarchical Pretraining for Biomedical Term Embeddings", which changes the multi-similarity loss of
Wang et al. 2019 so that it orders pairs by their distance in a tree; here every distance is a level with a base of its
own. s_ij = <z_i, z_j>; labels are int64 [B, L], coarse to fine; P_l(i) are the embeddings that agree with i on the
levels 1 to l, the sample's other views among them. The bases grow with the level (default l / (L + 1)): what shares the
finest level (synonyms) must be more alike than the last base, what shares the coarsest alone more than the first, what
shares none less. One level is `multi-similarity` without its mining.
"""

from __future__ import annotations

import torch
from pydantic import Field, field_validator
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.hierarchical import HierarchyConfig, HierarchyObjective
from cl.objectives.supervised.labelled import each_anchor


class HiPrBERTConfig(HierarchyConfig):
    alpha: float = Field(2.0, gt=0, description="sharpness on positives")
    beta: float = Field(50.0, gt=0, description="sharpness on negatives")
    bases: list[float] | None = Field(
        None,
        description="similarity that divides the pairs of each level, coarse to fine; default l / (L + 1)",
    )

    @field_validator("bases")
    @classmethod
    def _growing(cls, bases: list[float] | None) -> list[float] | None:
        if bases is not None and sorted(bases) != bases:
            raise ValueError(f"the bases of the levels must not fall from coarse to fine: {bases}")
        return bases


@OBJECTIVES.register(
    "hiprbert",
    "similarities ordered by the distance in a hierarchy: multi-similarity on every level, each with its own base",
    paper="Hierarchical Pretraining for Biomedical Term Embeddings",
)
class HiPrBERT(HierarchyObjective):
    """See the module's formula. No parameters."""

    Config = HiPrBERTConfig

    def __init__(self, config: HiPrBERTConfig) -> None:
        super().__init__(config)
        self.alpha, self.beta, self.bases = config.alpha, config.beta, config.bases

    def check(self, levels: int) -> None:
        if self.bases is not None and len(self.bases) != levels:
            raise DataError(
                f"The objective has {len(self.bases)} bases of levels, but the label {self.label!r} has {levels}."
            )

    def base(self, level: int, levels: int) -> float:
        """The similarity that divides the pairs of a level, which counts from 0."""
        return (level + 1) / (levels + 1) if self.bases is None else self.bases[level]

    def tile(self, t: Tile) -> Reductions:
        found, agreement = {}, list(self.agreement(t))
        for level, positives in enumerate(agreement):
            above = t.scores - self.base(level, len(agreement))
            found[f"pull {level}"] = self.lse(t, -self.alpha * above, mask=positives)
            found[f"push {level}"] = self.lse(t, self.beta * above, mask=~positives)
        return found

    def finish(self, s: Samples) -> list[Term]:
        levels = s.meta[self.label].shape[1]

        def loss(view: str) -> tuple[Tensor, Tensor]:
            zero = torch.zeros_like(s["pull 0", view])
            pull = sum((zero.logaddexp(s[f"pull {level}", view]) for level in range(levels)), zero) / self.alpha
            push = sum((zero.logaddexp(s[f"push {level}", view]) for level in range(levels)), zero) / self.beta
            return (pull + push) / levels, s.present[view]

        return each_anchor(s, loss)
