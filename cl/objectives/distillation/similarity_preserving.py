"""Similarity-preserving distillation: every pair of samples is as similar to the student as to the teacher.

    L = mean_i mean_{j != i} (s_i . s_j - t_i . t_j)^2

Tung and Mori 2019, "Similarity-Preserving Knowledge Distillation", on embeddings of length 1; the inner products
are those of relational distillation by distance (Park et al. 2019), |x - y|^2 = 2 - 2 x . y. Dimensions may differ.
Needs teacher views.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from cl.engine.rule import Comparison, Reductions, Samples, Term, Tile, row_sum
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import TiledConfig, TiledObjective


class SimilarityPreservingConfig(TiledConfig):
    targets: dict[str, str] = Field({"a": "a_teacher"}, description="student's view -> teacher's view", min_length=1)


@OBJECTIVES.register(
    "similarity-preserving",
    "every pair of samples is as similar to the student as to the teacher",
    paper="Similarity-Preserving Knowledge Distillation",
)
class SimilarityPreserving(TiledObjective):
    """See the module's formula."""

    Config = SimilarityPreservingConfig
    compares = "one or more views and their teacher's"
    needs = ("teacher views",)

    def __init__(self, config: SimilarityPreservingConfig) -> None:
        super().__init__(config)
        self.targets = config.targets

    def comparisons(self, views: Sequence[str]) -> Sequence[Comparison]:
        return [Comparison(mine, mine, {"teacher": (theirs, theirs)}) for mine, theirs in self.targets.items()]

    def tile(self, t: Tile) -> Reductions:
        gap = (t.scores - t.channels["teacher"]).square()
        return {"gap": row_sum(gap, over="all"), "n": row_sum(torch.ones_like(gap), over="all")}

    def finish(self, s: Samples) -> list[Term]:
        return [
            Term(
                s["gap", mine] / s["n", mine].clamp_min(1),
                s.valid(mine, theirs) & (s["n", mine] > 0),
                1 / len(self.targets),
            )
            for mine, theirs in self.targets.items()
        ]
