"""Soft supervised contrast: two samples are positives to the degree to which their labels mean the same.

    loss_i = -sum_j p_ij log softmax_j(l_ij),   p_ij = softmax_j(cos(y_i, y_j) / label_temperature)

Burdisso et al. 2024, "Dialog2Flow: Pre-training Soft-Contrastive Action-Driven Sentence Embeddings for Automatic Dialog
Flow Extraction": y is the embedding of a sample's textual label by a frozen sentence encoder, a label [B, K] of the
batch. A small label temperature gives supervised contrast of equal labels.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.rule import Tile
from cl.objectives.base import OBJECTIVES
from cl.objectives.graded.soft import Axis, SoftTargets, SoftTargetsConfig


class SoftLabelsConfig(SoftTargetsConfig):
    label: str = Field("vector", description="label with the embedding of what each sample is labelled, [B, K]")
    label_temperature: float = Field(0.35, gt=0, description="cosines of labels are divided by it")


@OBJECTIVES.register(
    "soft-labels",
    "cross-entropy with the similarity of label embeddings as targets (soft supervised contrast)",
    paper="Dialog2Flow: Pre-training Soft-Contrastive Action-Driven Sentence Embeddings for Automatic Dialog Flow "
    "Extraction",
)
class SoftLabels(SoftTargets):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = SoftLabelsConfig
    needs = ("label embeddings",)

    def __init__(self, config: SoftLabelsConfig) -> None:
        super().__init__(config)
        self.label, self.label_scale = config.label, 1 / config.label_temperature

    def labels(self) -> list[str]:
        return [self.label]

    def log_affinity(self, t: Tile, axis: Axis) -> tuple[Tensor, Tensor | None]:
        rows = normalize(t.row(self.label)[:, 0].to(t.scores.dtype), dim=1)
        columns = normalize(t.column(self.label)[0].to(t.scores.dtype), dim=1)
        return self.label_scale * rows @ columns.T, None
