"""Hierarchical labels: SupCon on every level of a taxonomy, with a weight for each.

    loss_i = 1/L sum_{l=1..L} w_l [ logsumexp_{a in A(i)} s_ia - 1/|P_l(i)| sum_{p in P_l(i)} s_ip ]

Zhang et al. 2022, "Use All The Labels: A Hierarchical Multi-Label Contrastive Learning Framework"
(HiMulCon). s_ij = <z_i, z_j> / tau; labels are int64 [B, L], coarse to fine (kingdom, ..., species); P_l(i) are the
embeddings of all views that agree with i on the levels 1 to l, the sample's own other views among them. The weights
default to those of the authors' program, w_l = 2^(1/(L - l + 1)): the finest level weighs most. An anchor takes part
in the levels on which it has a positive; one level with weight 1 is SupCon. Where the levels' names are texts
(BioCLIP), they are views: see `pairwise`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.rule import Reductions, Samples, Term, Tile
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.labelled import (
    LabelledConfig,
    LabelledObjective,
    ScaledLabelledConfig,
    ScaledLabelledObjective,
)
from cl.pairs import Pairs


class HierarchyConfig(LabelledConfig):
    label: str = Field("levels", description="the label, int64 [B, L], coarse to fine; below 0: unknown")


class HierarchyObjective(LabelledObjective):
    """Labels with levels, of which samples share the first few."""

    needs = ("labels with levels",)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        label = pairs.label(self.label)
        if label.dim() != 2:
            raise DataError(f"The label {self.label!r} has shape {list(label.shape)}; expected [samples, levels].")
        self.check(label.shape[1])
        return super().forward(pairs, workers)

    def check(self, levels: int) -> None:
        """Refuse settings that do not fit the number of levels."""

    def agreement(self, t: Tile) -> Iterator[Tensor]:
        """For each level, coarse to fine: [R, C] bool, row and column agree on it and on all above."""
        if t.columns.role == "negative":
            levels = t.rows.meta[self.label].shape[1]
            yield from [t.positive] * levels
            return
        rows, columns = t.row(self.label), t.column(self.label)
        agree = torch.ones_like(t.own)
        for level in range(rows.shape[2]):
            row, column = rows[..., level], columns[..., level]
            agree = agree & (row == column) & (row >= 0)
            yield agree | t.positive


class HiMulConConfig(HierarchyConfig, ScaledLabelledConfig):
    weights: list[float] | None = Field(None, description="of each level, coarse to fine; default 2^(1/(L - l + 1))")


@OBJECTIVES.register(
    "himulcon",
    "SupCon on every level of a taxonomy, weighted by level",
    paper="Use All The Labels: A Hierarchical Multi-Label Contrastive Learning Framework",
)
class HiMulCon(HierarchyObjective, ScaledLabelledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = HiMulConConfig

    def __init__(self, config: HiMulConConfig) -> None:
        super().__init__(config)
        self.weights = config.weights

    def check(self, levels: int) -> None:
        if self.weights is not None and len(self.weights) != levels:
            raise DataError(
                f"The objective has {len(self.weights)} weights of levels, but the label {self.label!r} has {levels}."
            )

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        found = {"all": self.lse(t, logits)}
        for level, positives in enumerate(self.agreement(t)):
            found[f"agree {level}"] = self.sum(t, logits, mask=positives)
            found[f"count {level}"] = self.sum(t, positives.to(logits))
        return found

    def finish(self, s: Samples) -> list[Term]:
        levels = s.meta[self.label].shape[1]
        weights = self.weights or [2 ** (1 / (levels - level)) for level in range(levels)]
        terms = []
        for level, weight in enumerate(weights):
            for view in s.present:
                count = s[f"count {level}", view]
                loss = s["all", view] - s[f"agree {level}", view] / count.clamp_min(1)
                terms.append(Term(loss, s.valid(view) & (count > 0), weight / levels / len(s.present)))
        return terms
