"""A sum of two-view losses over pairs of any number of views.

    loss = sum_{(u, v)} w_uv mean_i [ (logsumexp_j l_uv,ij - l_uv,ii + logsumexp_j l_uv,ji - l_uv,ii) / 2 ]
    l_uv,ij = <u_i, v_j> / tau

Tian et al. 2020, "Contrastive Multiview Coding": all pairs of views ("full graph"), or the first view
against each other one ("core view": image against audio, depth, text ..., as ImageBind). Each pair's mean is over the
samples that have both views, so a batch may lack modalities here and there. Where the levels of a taxonomy are
written out as texts (BioCLIP), each level is a view and the image the core. Default weights are 1 over the number of
pairs; with two views it is symmetric InfoNCE.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Literal, Self

from pydantic import Field, model_validator

from cl.engine.rule import Reductions, Samples, Term, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.multiview.views import ManyViewsConfig, ManyViewsObjective


class PairwiseConfig(ManyViewsConfig):
    graph: Literal["full", "core"] = Field("full", description="all pairs of views, or the first view with each other")
    pairs: list[tuple[str, str]] | None = Field(None, description="the pairs themselves, instead of a graph")
    weights: list[float] | None = Field(None, description="of each pair, in order; default: 1 over their number")

    @model_validator(mode="after")
    def _weights_of_pairs(self) -> Self:
        if self.weights is not None and (self.pairs is None or len(self.weights) != len(self.pairs)):
            number = "no pairs" if self.pairs is None else f"{len(self.pairs)} pairs"
            raise ValueError(f"weights has {len(self.weights)} entries for {number}: name the pairs, one weight each")
        return self


@OBJECTIVES.register(
    "pairwise",
    "symmetric InfoNCE summed over pairs of any number of views, weighted",
    paper="Contrastive Multiview Coding",
)
class Pairwise(ManyViewsObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = PairwiseConfig

    def __init__(self, config: PairwiseConfig) -> None:
        super().__init__(config)
        self.graph, self.pairs, self.weights = config.graph, config.pairs, config.weights

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        if self.pairs is not None:
            return self.pairs
        return list(combinations(views, 2)) if self.graph == "full" else [(views[0], view) for view in views[1:]]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        return {f"{t.row_view} {t.column_view}": [row_lse(logits), column_lse(logits)]}

    def finish(self, s: Samples) -> list[Term]:
        pairs = self.comparisons(list(s.present))
        terms = []
        for number, (first, second) in enumerate(pairs):
            name = f"{first} {second}"
            loss = (s[name, first] + s[name, second]) / 2 - self.temperature() * s.own(first, second)
            weight = 1 / len(pairs) if self.weights is None else self.weights[number]
            terms.append(Term(loss, s.valid(first, second), weight))
        return terms
