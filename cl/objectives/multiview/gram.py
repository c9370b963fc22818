"""GRAM: the volume that all modalities of a tuple span; aligned ones span none.

    V(a_i; j) = sqrt det G(a_i, v2_j, ..., vM_j),      G the matrix of all inner products
    loss_i    = 1/2 [ V_ii / tau + logsumexp_j -V(a_i; j) / tau ] + 1/2 [ V_ii / tau + logsumexp_j -V(a_j; i) / tau ]

Cicchetti et al. 2025, "Gramian Multimodal Representation Learning and Alignment": the first view is the
anchor (text in the paper), the other modalities of a sample stay together; either the anchor or the rest is
exchanged. The determinant is expanded along the anchor, det G = |a|^2 det C - g^T adj(C) g, with C the inner products
of the others and g those with the anchor, so a tile needs one product a modality, and nothing is inverted: identical
embeddings are safe. With two views V is the sine of the angle. Any two modalities that coincide span no volume
whatever the others are, so views of one kind (two crops of a picture) do not belong into one tuple.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cl.engine.collectives import Layout
from cl.engine.rule import Comparison, Reductions, Samples, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.multiview.views import ManyViewsConfig, ManyViewsObjective
from cl.pairs import Pairs


@OBJECTIVES.register(
    "gram",
    "the volume spanned by all modalities of a sample, small for its own and large for others'",
    paper="Gramian Multimodal Representation Learning and Alignment",
)
class Gram(ManyViewsObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = ManyViewsConfig

    def derive(self, pairs: Pairs, layout: Layout) -> Pairs:
        """The other modalities of a sample stay together: it has all of them or none."""
        pairs = super().derive(pairs, layout)
        others = list(pairs.views)[1:]
        if masks := [pairs.present[view] for view in others if view in pairs.present]:
            pairs = replace(pairs, present={**pairs.present, **dict.fromkeys(others, torch.stack(masks).all(0))})
        return pairs

    def comparisons(self, views: Sequence[str]) -> list[Comparison]:
        anchor, second, *others = views
        return [Comparison(anchor, second, {view: (anchor, view) for view in others})]

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        """Of the anchors their squared length; of the others det C and the entries of adj C."""
        anchor, *others = s.present
        gram = torch.stack([torch.stack([s.own(u, v) for v in others]) for u in others])  # [M - 1, M - 1, B]
        found = {("square", anchor): s.own(anchor, anchor), ("det", others[0]): determinant(gram)}
        for u, row in enumerate(adjugate(gram)):
            for v, entry in enumerate(row):
                found[f"adj {u} {v}", others[0]] = entry
        return found

    def tile(self, t: Tile) -> Reductions:
        products = [t.scores, *t.channels.values()]
        square = t.row("square") * t.column("det")
        for u, left in enumerate(products):
            for v, right in enumerate(products):
                square = square - left * right * t.column(f"adj {u} {v}")
        logits = -self.temperature() * root(square)
        return {"lse": [row_lse(logits), column_lse(logits)]}

    def finish(self, s: Samples) -> Tensor:
        anchor, second, *_ = s.present
        every = list(s.present)
        gram = torch.stack([torch.stack([s.own(u, v) for v in every]) for u in every])
        return (s["lse", anchor] + s["lse", second]) / 2 + self.temperature() * root(determinant(gram))


def root(square: Tensor) -> Tensor:
    """The square root; 0, with no slope, where rounding leaves nothing or less."""
    alive = square > torch.finfo(square.dtype).eps
    return torch.where(alive, square.where(alive, 1).sqrt(), 0)


def determinant(matrix: Tensor) -> Tensor:
    """[...] of [m, m, ...] for a few m, by expansion: a polynomial, smooth where a matrix is singular."""
    if len(matrix) == 1:
        return matrix[0, 0]
    return sum((-1) ** k * matrix[0, k] * determinant(minor(matrix, 0, k)) for k in range(len(matrix)))


def minor(matrix: Tensor, row: int, column: int) -> Tensor:
    """[m - 1, m - 1, ...]: without one row and one column."""
    rows = [i for i in range(len(matrix)) if i != row]
    columns = [j for j in range(len(matrix)) if j != column]
    return matrix[rows][:, columns]


def adjugate(matrix: Tensor) -> list[list[Tensor]]:
    """The adjugate of a symmetric [m, m, ...], entry by entry."""
    size = range(len(matrix))
    if len(matrix) == 1:
        return [[torch.ones_like(matrix[0, 0])]]
    return [[(-1) ** (u + v) * determinant(minor(matrix, u, v)) for v in size] for u in size]
