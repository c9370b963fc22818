"""Cross-entropy with soft targets that the batch brings along.

    loss_i = -sum_j p_ij log softmax_j(l_ij),   p_ij = (1 - own) T_ij / sum_k T_ik + own [i = j]

T [B, N] is `pairs.targets[target]`: any similarity between samples that somebody has computed, not negative; the other
direction takes its transpose. ConGraT (Brannon et al. 2023, "ConGraT: Self-Supervised Contrastive Pretraining for Joint
Graph and Text Embeddings") blends a similarity of graph nodes with the identity; SPACE-2 (He et al. 2022, "SPACE-2:
Tree-Structured Semi-Supervised Contrastive Pre-training for Task-Oriented Dialog Understanding") weighs all pairs by a
similarity of semantic trees.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cl.engine.rule import Tile
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES
from cl.objectives.graded.soft import Axis, SoftTargets, SoftTargetsConfig, log_of


class GivenTargetsConfig(SoftTargetsConfig):
    target: str = Field("soft", description="name of the targets in the batch")
    same_side: bool = Field(False, description="the anchor's own view too, with the same targets between samples")


def target_of(t: Tile, name: str) -> Tensor:
    """[R, C]: the batch's targets of that name, with a clear error when they are not there."""
    if name not in t.targets:
        have = ", ".join(t.targets) or "none"
        raise DataError(f"The objective needs the targets {name!r}, but the batch's targets are: {have}.")
    return t.targets[name]


@OBJECTIVES.register(
    "soft-targets",
    "cross-entropy between candidates and given similarities of samples (ConGraT, SPACE-2)",
    paper="ConGraT: Self-Supervised Contrastive Pretraining for Joint Graph and Text Embeddings",
)
class GivenTargets(SoftTargets):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = GivenTargetsConfig
    needs = ("targets",)

    def __init__(self, config: GivenTargetsConfig) -> None:
        super().__init__(config)
        self.target = config.target

    def log_affinity(self, t: Tile, axis: Axis) -> tuple[Tensor, Tensor | None]:
        return log_of(target_of(t, self.target))
