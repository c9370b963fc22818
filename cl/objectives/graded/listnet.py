"""ListNet: the chance of each candidate to be first, by relevance and by score.

    loss_i = -sum_j softmax_j(y_ij / target_temperature) log softmax_j(l_ij)

Cao et al. 2007, "Learning to Rank: From Pairwise Approach to Listwise Approach" (top one probabilities). y [B, N] is
`pairs.targets[target]`: the relevance of every sample of the global batch to each of this worker's; -inf gives a
candidate no chance.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cl.engine.rule import Tile
from cl.objectives.base import OBJECTIVES
from cl.objectives.graded.soft import Axis, SoftTargets, SoftTargetsConfig
from cl.objectives.graded.soft_targets import target_of


class ListNetConfig(SoftTargetsConfig):
    target: str = Field("soft", description="name of the relevances in the batch's targets")
    target_temperature: float = Field(1.0, gt=0, description="relevances are divided by it")


@OBJECTIVES.register(
    "listnet",
    "cross-entropy between the softmax of relevances and that of scores",
    paper="Learning to Rank: From Pairwise Approach to Listwise Approach",
)
class ListNet(SoftTargets):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = ListNetConfig
    needs = ("targets",)

    def __init__(self, config: ListNetConfig) -> None:
        super().__init__(config)
        self.target, self.target_scale = config.target, 1 / config.target_temperature

    def log_affinity(self, t: Tile, axis: Axis) -> tuple[Tensor, Tensor | None]:
        relevance = self.target_scale * target_of(t, self.target)
        some = relevance.isfinite()
        return relevance.where(some, 0), some
