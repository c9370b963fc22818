"""Gated subspaces: any two classes may be a pair, alike in the dimensions that a gate of the class pair leaves open.

    g_i    = sigmoid( W2 relu( W1 (e_y + e_y') / 2 ) )     the gate of pair i, of classes y (first view) and y' (second)
    s_ij   = cos( g_i * a_i, g_i * b_j )                   candidates are seen through the anchor's gate
    loss_i = 1/2 [ logsumexp_j s_ij / tau - s_ii / tau ] + 1/2 [ logsumexp_j s'_ij / tau - s'_ii / tau ]

Wu et al. 2024, "Rethinking Positive Pairs in Contrastive Learning" (Hydra): e is a table of class vectors,
the gate a small network of their mean, so that C classes give C (C + 1) / 2 subspaces without a table of that size.
s' has the second view as anchor. Row i of the batch is a pair; its label is [B, 2] (the classes of both views) or [B]
(one class). Gates that are open everywhere give InfoNCE of cosines.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pydantic import Field
from torch import Tensor, nn

from cl.engine.collectives import Layout
from cl.engine.normalise import unit
from cl.engine.rule import Comparison, Known, Reductions, Samples, Tile, row_lse, row_sum
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class GatedConfig(ScaledConfig):
    label: str = Field("class", description="the label, int64 [B], or [B, 2] where the views of a pair differ in class")
    classes: int = Field(ge=1, description="number of classes of the data, not of the batch")
    hidden: int = Field(64, ge=1, description="width of class vectors and of the gate's hidden layer")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


@OBJECTIVES.register(
    "gated-subspaces",
    "InfoNCE in a subspace that a learnt gate opens for each pair of classes (Hydra)",
    paper="Rethinking Positive Pairs in Contrastive Learning",
)
class GatedSubspaces(ScaledObjective):
    """See the module's formula. Parameters: class vectors, the gate's two layers, log of the inverse temperature."""

    Config = GatedConfig
    needs = ("class labels",)

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None
        self.label, self.classes = config.label, config.classes
        self.vectors = nn.Embedding(config.classes, config.hidden)
        self.gate = nn.Sequential(
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.dimensions),
            nn.Sigmoid(),
        )

    def labels(self) -> Collection[str]:
        return [self.label]

    def derive(self, pairs: Pairs, layout: Layout) -> Pairs:
        value = pairs.label(self.label)
        if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < self.classes:
            raise DataError(
                f"The label {self.label!r} holds classes from {int(value.min())} to {int(value.max())}; expected 0 to "
                f"{self.classes - 1}."
            )
        return super().derive(pairs, layout)

    def comparisons(self, views: Sequence[str]) -> list[Comparison]:
        first, second = views[:2]
        further = [(first, name) for name in self.extra]
        return [Comparison(*each, score=self.score) for each in [(first, second), (second, first), *further]]

    def score(self, rows: Tensor, columns: Tensor, known_rows: Known, known_columns: Known) -> Tensor:
        """[R, C]: cosines in each row's subspace; 0 where nothing of a vector is left."""
        label = known_rows.meta[self.label]
        vectors = self.vectors(label if label.dim() == 2 else label[:, None]).mean(1)
        gates = self.gate(vectors).to(rows.dtype)
        square = gates.square() @ columns.square().T
        alive = square > 0
        length = square.where(alive, 1).sqrt()
        return ((gates * unit(gates * rows)) @ columns.T / length).where(alive, 0)

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        found = {"all": row_lse(logits)}
        return found if t.column_view in self.extra else {**found, "own": row_sum(logits, mask=t.own)}

    def finish(self, s: Samples) -> Tensor:
        first, second = list(s.present)[:2]
        return (s["all", first] - s["own", first] + s["all", second] - s["own", second]) / 2
