"""What objectives of moments share: two views of the samples that have both, as rows for `cl.engine.moments`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from cl.config import Config
from cl.engine import moments
from cl.engine.collectives import Workers
from cl.objectives.base import Objective
from cl.objectives.heads import Head
from cl.pairs import Pairs


class MomentConfig(Config):
    """Fields of objectives on whole-batch moments."""

    views: list[str] | None = Field(None, description="the views to compare, in order; default: all of the batch")
    projector: list[int] = Field(
        [], description="widths of the layers between embeddings and loss; empty: the embeddings themselves"
    )
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


@dataclass(frozen=True)
class Rows:
    """Rows [B, D] of several views of the same samples; a sample that lacks one of them has weight 0, and zeros."""

    views: list[Tensor]
    weight: Tensor

    def mean(self, values: Tensor, workers: Workers) -> Tensor:
        """sum_i w_i values_i / sum_i w_i over all workers, for values [B]; to be passed through `replicated`."""
        return moments.mean(values[:, None], self.weight, workers)[0]


class MomentObjective(Objective):
    """An objective that is a function of global means; a subclass defines `forward` on `self.rows(...)`."""

    memory = "batch x dim + dim x dim"

    def __init__(self, config: MomentConfig) -> None:
        super().__init__()
        assert config.dimensions is not None
        self.view_names: Sequence[str] | None = config.views
        self.projector = Head([config.dimensions, *config.projector]) if config.projector else None
        self.width = config.projector[-1] if config.projector else config.dimensions

    def names(self, pairs: Pairs) -> list[str]:
        """The views to compare."""
        return list(self.view_names or pairs.views)

    def rows(self, pairs: Pairs, workers: Workers) -> Rows:
        """The views, projected, in float32 or float64."""
        names = self.names(pairs)
        weight = pairs.weights()
        for name in names:
            weight = weight.where(pairs.view_weights(name) > 0, 0)
        alive = (weight > 0)[:, None]
        views = [pairs.view(name).to(pairs.dtype).where(alive, 0) for name in names]
        if self.projector is not None:
            views = [self.projector(view, weight, workers).where(alive, 0) for view in views]
        return Rows(views, weight)
