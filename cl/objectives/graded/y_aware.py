"""y-aware InfoNCE: continuous labels say how much of a positive each sample is.

    loss_i = -sum_j p_ij log softmax_j(l_ij),   p_ij = w_ij / sum_k w_ik,   w_ij = exp(-|y_i - y_j|^2 / (2 sigma^2))

Dufumier et al. 2021, "Contrastive Learning with Continuous Proxy Meta-Data for 3D MRI Classification". y is a label of
numbers [B] or [B, K]; sigma to 0 gives InfoNCE (where no two labels are equal), to infinity alignment of all.
`same_side` takes the candidates of both views, as the authors' code does.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Tile
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES
from cl.objectives.graded.soft import Axis, SoftTargets, SoftTargetsConfig


class YAwareConfig(SoftTargetsConfig):
    label: str = Field("score", description="label of numbers, [B] or [B, K]")
    sigma: float = Field(1.0, gt=0, description="bandwidth of the Gaussian kernel of the label")


@OBJECTIVES.register(
    "y-aware",
    "InfoNCE whose positives are weighted by a kernel of a continuous label",
    paper="Contrastive Learning with Continuous Proxy Meta-Data for 3D MRI Classification",
)
class YAware(SoftTargets):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = YAwareConfig
    needs = ("numbers as labels",)

    def __init__(self, config: YAwareConfig) -> None:
        super().__init__(config)
        self.label, self.precision = config.label, 1 / (2 * config.sigma**2)

    def labels(self) -> list[str]:
        return [self.label]

    def log_affinity(self, t: Tile, axis: Axis) -> tuple[Tensor, Tensor | None]:
        return -self.precision * label_squared_distances(t, self.label), None


def label_squared_distances(t: Tile, name: str) -> Tensor:
    """[R, C]: squared distances of a label of numbers [B] or [B, K]."""
    rows, columns = t.row(name).to(t.scores.dtype), t.column(name).to(t.scores.dtype)
    if rows.dim() == 2:
        return (rows - columns).square()
    if rows.dim() != 3:
        raise DataError(f"The label {name!r} has shape {list(rows.shape)}; expected numbers [B] or [B, K].")
    return torch.cdist(rows[:, 0], columns[0]).square()
