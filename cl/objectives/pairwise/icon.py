"""I-Con: one loss for all that pull a learnt neighbourhood q towards a given one p, each by its name.

    loss_i = -sum_j [ (1 - uniform) p_ij + uniform / n_i ] log q_ij       (the divergence KL(p | q), plus p's entropy)

    p   pairs        the sample's own other view                              SimCLR, CLIP
        labels       all samples of the same class                            SupCon
        kernel       softmax_j(<t_i, t_j> / p_temperature) of a teacher       SNE, distillation
        neighbours   the k nearest samples to a teacher, and the own pair     kNN graphs
        targets      given similarities of samples                            ConGraT, SPACE-2
    q   cosine       softmax_j(<a_i, c_j> / tau)
        gaussian     softmax_j(-|a_i - c_j|^2 / (2 tau))
        student-t    proportional to (1 + |a_i - c_j|^2 / (nu tau))^(-(nu + 1) / 2)

Alshammari et al. 2025, "I-Con: A Unifying Framework for Representation Learning", eq. 1. `uniform` is the paper's
debiasing, a share of p that is even over the n_i candidates. Candidates are the other view of all workers' samples,
with `same_side` the anchor's own view as well. The learnt neighbourhood of shared clusters is `i-con-cluster`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.reduction import Reduction
from cl.engine.rule import Comparison, Reductions, Samples, Tile, Tiler, column_sum, row_sum, row_top
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES
from cl.objectives.graded.soft import Axis, SoftTargets, SoftTargetsConfig, log_of
from cl.objectives.graded.soft_targets import target_of
from cl.objectives.pairwise.distance import own_squared_distance, square_norms, squared_distances


class NeighbourhoodConfig(SoftTargetsConfig):
    p: Literal["pairs", "labels", "kernel", "neighbours", "targets"] = Field("pairs", description="the given one")
    uniform: float = Field(0.0, ge=0, lt=1, description="share of p that is even over the candidates")
    label: str = Field("class", description="labels: the class of each sample, int [B]")
    target: str = Field("soft", description="targets: their name in the batch")
    teachers: tuple[str, str] | None = Field(
        None, description="kernel, neighbours: views of a frozen model for the first and the second view"
    )
    p_temperature: float = Field(0.1, gt=0, description="kernel: similarities of the teacher are divided by it")
    k: int = Field(5, ge=1, description="neighbours: how many")


class IConConfig(NeighbourhoodConfig):
    q: Literal["cosine", "gaussian", "student-t"] = Field("cosine", description="the learnt one")
    degrees: float = Field(1.0, gt=0, description="nu, degrees of freedom of Student's t")


class Neighbourhood(SoftTargets):
    """The given neighbourhoods p of the module's formula; a subclass says what the learnt one is."""

    def __init__(self, config: NeighbourhoodConfig) -> None:
        super().__init__(config)
        self.given = config
        self.stopped = frozenset({"nearest"})

    def labels(self) -> list[str]:
        return [self.given.label] if self.given.p == "labels" else []

    def comparisons(self, views: Sequence[str]) -> list[Comparison]:
        pairs = self.compared(views)
        if self.given.p not in ("kernel", "neighbours"):
            return [Comparison(*pair) for pair in pairs]
        teachers = dict(zip(views[:2], self.given.teachers or [f"{view}_teacher" for view in views[:2]], strict=True))
        for teacher in teachers.values():
            if teacher not in views:
                raise DataError(f"p: {self.given.p} compares the view {teacher!r}; the batch has {', '.join(views)}.")
        return [Comparison(row, column, {"teacher": (teachers[row], teachers[column])}) for row, column in pairs]

    def passes(self) -> list[Tiler]:
        return [self.nearest, self.tile] if self.given.p == "neighbours" else [self.tile]

    def nearest(self, t: Tile) -> Reductions:
        """First, how near the k-th nearest sample is to the teacher."""
        alike = t.channels["teacher"].detach()
        if t.row_view == t.column_view:
            return {"nearest": row_top(alike, self.given.k)}
        return {"nearest": self.each(row_top, alike, self.given.k)}

    def log_affinity(self, t: Tile, axis: Axis) -> tuple[Tensor, Tensor | None]:
        even = torch.zeros_like(t.scores)
        if self.given.p == "pairs":
            return even, t.positive
        if self.given.p == "labels":
            return even, t.row(self.given.label) == t.column(self.given.label)
        if self.given.p == "targets":
            return log_of(target_of(t, self.given.target))
        alike = t.channels["teacher"].detach()
        if self.given.p == "neighbours":
            least = (t.row("nearest") if axis == "row" else t.column("nearest"))[..., -1]
            return even, (alike >= least) | t.positive
        return alike / self.given.p_temperature, None

    def along(self, t: Tile, logits: Tensor, axis: Axis) -> dict[str, Reduction]:
        found = super().along(t, logits, axis)
        if self.given.uniform:
            total = row_sum if axis == "row" else column_sum
            found |= {"even": total(logits), "count": total(torch.ones_like(logits))}
        return found

    def pull(self, s: Samples, view: str) -> Tensor:
        given = super().pull(s, view)
        if not self.given.uniform:
            return given
        even = s["even", view] / s["count", view].clamp_min(1)
        return (1 - self.given.uniform) * given + self.given.uniform * even


@OBJECTIVES.register(
    "i-con",
    "a learnt neighbourhood pulled towards a given one; any of five with any of three",
    paper="I-Con: A Unifying Framework for Representation Learning",
)
class ICon(Neighbourhood):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = IConConfig

    def __init__(self, config: IConConfig) -> None:
        super().__init__(config)
        self.learnt_kind, self.degrees = config.q, config.degrees

    def q(self, cosine: Tensor, squared: Tensor) -> Tensor:
        """log q, up to a constant of the anchor, from cosines and squared distances."""
        scale, degrees = self.temperature(), self.degrees
        if self.learnt_kind == "cosine":
            return scale * cosine
        if self.learnt_kind == "gaussian":
            return -scale * squared / 2
        return -(degrees + 1) / 2 * (scale * squared / degrees).log1p()

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        return {} if self.learnt_kind == "cosine" else square_norms(s, list(s.views)[:2])

    def logits(self, t: Tile) -> Tensor:
        return self.q(t.scores, t.scores if self.learnt_kind == "cosine" else squared_distances(t))

    def own_logit(self, s: Samples) -> Tensor:
        first, second = list(s.views)[:2]
        return self.q(s.own(first, second), own_squared_distance(s, first, second))
