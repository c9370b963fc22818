"""Contrastive predictive coding: a linear prediction of each future from the context, picked among other samples.

    loss_i = mean_k ( log sum_j e(z_jk, W_k c_i) - l(z_ik, W_k c_i) ),   l(z, p) = <z, p> / tau,   e = exp l

van den Oord, Li and Vinyals 2018, "Representation Learning with Contrastive Predictive Coding", eq. 3 and 4. The first
view is the context c, the others are the futures z_k of horizons k = 1, 2, ...; candidates of a horizon are the same
horizon of all workers' samples. A sample counts for the horizons that it has. W_k starts as the identity. tau = 1 is
the paper's; for embeddings of length 1 a smaller one is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from cl.engine.collectives import Workers
from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES, Outcome
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs

PREDICTION = "prediction of {}"


class CPCConfig(ScaledConfig):
    horizons: int = Field(1, ge=1, description="number of futures: views after the first")
    dimensions: int | None = Field(None, ge=1, description="size of the embeddings; default: the model's")


@OBJECTIVES.register(
    "cpc",
    "linear predictions of futures from a context, each picked among all samples' (bilinear score)",
    paper="Representation Learning with Contrastive Predictive Coding",
)
class CPC(ScaledObjective):
    """See the module's formula. Parameters: W [K, D, D], and the log of the inverse temperature."""

    Config = CPCConfig
    compares = "a context and its futures"

    def __init__(self, config: CPCConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None
        self.sources, self.view_names = config.views, None  # tiles compare predictions
        self.horizons = config.horizons
        self.predictors = nn.Parameter(torch.eye(config.dimensions).repeat(config.horizons, 1, 1))

    def learnt(self) -> Sequence[Tensor]:
        return list(self.temperature.parameters())  # the predictors are used before the tiles

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        context, *futures = list(self.sources or pairs.views)
        if len(futures) != self.horizons:
            raise DataError(
                f"The objective predicts {self.horizons} horizons, but the batch has {len(futures)} futures."
            )
        known = pairs.view(context).to(pairs.dtype).where(pairs.view_weights(context)[:, None] > 0, 0)
        views, present = {}, {}
        for future, predictor in zip(futures, self.predictors.to(known.dtype), strict=True):
            name = PREDICTION.format(future)
            views[name], views[future] = known @ predictor.T, pairs.view(future)
            present[name], present[future] = pairs.view_weights(context) > 0, pairs.view_weights(future) > 0
        return super().forward(replace(pairs, views=views, present=present, tokens={}), workers)

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        names = list(views)[: 2 * self.horizons]
        return list(zip(names[::2], names[1::2], strict=True))

    def tile(self, t: Tile) -> Reductions:
        return {"lse": row_lse(self.temperature() * t.scores)}

    def finish(self, s: Samples) -> list[Term]:
        terms = []
        for prediction, future in self.comparisons(list(s.views)):
            loss = s["lse", prediction] - self.temperature() * s.own(prediction, future)
            terms.append(Term(loss, s.valid(prediction, future), factor=1 / self.horizons))
        return terms
