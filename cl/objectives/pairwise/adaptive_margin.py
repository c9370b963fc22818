"""Adaptive relevance margins: how far a document must lie below the right one depends on how alike the two are.

    loss_i = mean_{j != i} error( <a_i, c_i> - <a_i, c_j> - target_ij ),   target_ij = (1 + <c_i, c_j>) / 2

Gienapp et al. 2025, "Learning Effective Representations for Retrieval Using Self-Distillation with Adaptive Relevance
Margins", the in-batch loss; error(x) is x^2, |x| or log(1 + exp(-x)). The target is as the authors' code has it;
`target: distance` takes (1 - <c_i, c_j>) / 2 instead. It carries a gradient unless `stop_target`. Documents c_j are the
second view of all other samples of all workers, and mined negatives (`extra`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from cl.engine.rule import Comparison, Reductions, Samples, Term, Tile, row_sum
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import TiledConfig, TiledObjective

ERRORS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": torch.square,
    "l1": torch.abs,
    "soft": lambda value: -logsigmoid(value),
}


class AdaptiveMarginConfig(TiledConfig):
    error: Literal["l2", "l1", "soft"] = Field("l2", description="of the difference between margin and target")
    target: Literal["similarity", "distance"] = Field("similarity", description="what of two documents is the margin")
    stop_target: bool = Field(False, description="no gradient through the target")


@OBJECTIVES.register(
    "adaptive-margin",
    "regression of score margins on the similarity of the documents (self-distillation)",
    paper="Learning Effective Representations for Retrieval Using Self-Distillation with Adaptive Relevance Margins",
)
class AdaptiveMargin(TiledObjective):
    """See the module's formula. It has no parameters."""

    Config = AdaptiveMarginConfig

    def __init__(self, config: AdaptiveMarginConfig) -> None:
        super().__init__(config)
        self.error = ERRORS[config.error]
        self.sign = 1 if config.target == "similarity" else -1
        self.stop_target = config.stop_target

    def comparisons(self, views: Sequence[str]) -> list[Comparison]:
        first, second = views[:2]
        return [Comparison(first, name, {"documents": (second, name)}) for name in (second, *self.extra)]

    def inputs(self, s: Samples) -> dict[tuple[str, str], Tensor]:
        first, second = list(s.views)[:2]
        return {("own", first): s.own(first, second)}

    def tile(self, t: Tile) -> Reductions:
        documents = t.channels["documents"]
        target = (1 + self.sign * (documents.detach() if self.stop_target else documents)) / 2
        error = self.error(t.row("own") - t.scores - target)
        return {
            "error": row_sum(error, over="negatives"),
            "count": row_sum(torch.ones_like(error), over="negatives"),
        }

    def finish(self, s: Samples) -> list[Term]:
        count = s["count"]
        return [Term(s["error"] / count.clamp_min(1), valid=count > 0)]
