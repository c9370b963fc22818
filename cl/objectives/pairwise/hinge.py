"""Hinge ranking: a margin between the own pair's cosine and that of others, summed or for the hardest alone.

    sum      loss_i = sum_{j != i} [margin - s_ii + s_ij]_+ + sum_{j != i} [margin - s_ii + s_ji]_+
    hardest  loss_i = max_{j != i} [margin - s_ii + s_ij]_+ + max_{j != i} [margin - s_ii + s_ji]_+

Kiros, Salakhutdinov and Zemel 2014, "Unifying Visual-Semantic Embeddings with Multimodal Neural Language Models", and
Faghri et al. 2018, "VSE++: Improving Visual-Semantic Embeddings with Hard Negatives". The sum over j is not averaged,
the mean over i is; `negatives: mean` averages over j too, which makes batch sizes comparable.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.reduction import Reduction
from cl.engine.rule import Reductions, Samples, Term, Tile, column_sum, column_top, row_sum, row_top
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import TiledConfig, TiledObjective


class HingeConfig(TiledConfig):
    negatives: Literal["sum", "mean", "hardest"] = Field("sum", description="which negatives cost")
    margin: float = Field(0.2, ge=0, le=2, description="by how much the own pair's cosine must be larger")


@OBJECTIVES.register(
    "hinge",
    "sum of hinges between the own pair and every other, in both directions (VSE)",
    paper="Unifying Visual-Semantic Embeddings with Multimodal Neural Language Models",
)
class Hinge(TiledObjective):
    """See the module's formula. It has no parameters."""

    Config: type[HingeConfig] = HingeConfig

    def __init__(self, config: HingeConfig) -> None:
        super().__init__(config)
        self.config = config

    def inputs(self, s: Samples) -> dict[tuple[str, str], Tensor]:
        views = list(s.views)[:2]
        own = s.own(*views)
        return {("own", view): own for view in views}

    def tile(self, t: Tile) -> Reductions:
        if self.config.negatives == "hardest":
            return {"hardest": [row_top(t.scores, 1), column_top(t.scores, 1)]}
        found: dict[str, list[Reduction]] = {
            "cost": [row_sum(self.cost(t.row("own"), t.scores), over="negatives")],
            "count": [row_sum(torch.ones_like(t.scores), over="negatives")],
        }
        if t.column_view not in self.extra:
            found["cost"].append(column_sum(self.cost(t.column("own"), t.scores), over="negatives"))
            found["count"].append(column_sum(torch.ones_like(t.scores), over="negatives"))
        return found

    def cost(self, own: Tensor, others: Tensor) -> Tensor:
        return (self.config.margin - own + others).relu()

    def finish(self, s: Samples) -> list[Term]:
        views = list(s.views)[:2]
        if self.config.negatives == "hardest":
            # Without any negative the hardest is -inf, and the hinge 0.
            return [Term(self.cost(s.own(*views), s["hardest", view][:, 0]), s.valid(*views)) for view in views]
        terms = []
        for view in views:
            count = s["count", view].clamp_min(1) if self.config.negatives == "mean" else 1
            terms.append(Term(s["cost", view] / count, s.valid(*views)))
        return terms


class HardestHingeConfig(HingeConfig):
    negatives: Literal["sum", "mean", "hardest"] = Field("hardest", description="which negatives cost")


@OBJECTIVES.register(
    "vse++",
    "hinge between the own pair and the hardest other, in both directions",
    paper="VSE++: Improving Visual-Semantic Embeddings with Hard Negatives",
)
class HardestHinge(Hinge):
    """See the module's formula."""

    Config = HardestHingeConfig
