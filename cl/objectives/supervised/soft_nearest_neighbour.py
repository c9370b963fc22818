"""Soft nearest neighbours: how much of an anchor's neighbourhood is of its own class.

    loss_i = -log( sum_{p in P(i)} exp(-|z_i - z_p|^2 / T) / sum_{a in A(i)} exp(-|z_i - z_a|^2 / T) )

Frosst, Papernot and Hinton 2019, "Analyzing and Improving Representations with the Soft Nearest Neighbor Loss", eq. 1
(Salakhutdinov and Hinton 2007 for the form). Distances are Euclidean, of embeddings of any length. A(i) are all
embeddings of all views but i itself, P(i) those of the same class; anchors without a positive have no loss.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.supervised.labelled import ScaledLabelledConfig, ScaledLabelledObjective, each_anchor


class SoftNearestNeighbourConfig(ScaledLabelledConfig):
    temperature: Scheduled = Field(0.5, description="initial temperature; squared distances are divided by it")


@OBJECTIVES.register(
    "soft-nearest-neighbour",
    "the share of an anchor's soft neighbourhood, by Euclidean distance, that is of its class",
    paper="Analyzing and Improving Representations with the Soft Nearest Neighbor Loss",
)
class SoftNearestNeighbour(ScaledLabelledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = SoftNearestNeighbourConfig

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        return {("square", view): s.own(view, view) for view in s.views}

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * (2 * t.scores - t.row("square") - t.column("square"))
        return {"all": self.lse(t, logits), "own": self.lse(t, logits, mask=self.positives(t))}

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            return s["all", view] - s["own", view], s["own", view].isfinite()

        return each_anchor(s, loss)
