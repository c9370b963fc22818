"""Kernel-InfoNCE: a mixture of exponential kernels of the distance in the place of exp(cos / tau).

    loss_i  = log sum_{c != a_i} K(a_i, c) - log K(a_i, b_i)
    K(x, y) = sum_m weight_m exp( -|x_m - y_m|^(2 power_m) / tau_m )

Tan et al. 2024, "Contrastive Learning Is Spectral Clustering On Similarity Graph": power 1 is the Gaussian kernel, that
of InfoNCE, 1/2 the Laplacian. `concatenate: false` (the paper's Simple Sum) takes all dimensions for every kernel;
`concatenate: true` (Concatenation Sum) splits them evenly, one part x_m a kernel. Candidates c are both views of all
other samples, and the positive, as in NT-Xent; `same_side: false` leaves those of the anchor's own view out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from cl.config import Config
from cl.engine.rule import Comparison, Known, Reductions, Samples, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.pairwise.distance import own_squared_distance, power, square_norms, squared_distances
from cl.objectives.tiled import TiledConfig, TiledObjective


class Kernel(Config):
    """One term of the mixture."""

    power: float = Field(1.0, gt=0, le=1, description="exponent of the squared distance; 1: Gaussian, 1/2: Laplacian")
    temperature: float = Field(1.0, gt=0, description="the power of the distance is divided by it")
    weight: float = Field(1.0, gt=0, description="share of the mixture")


class KernelInfoNCEConfig(TiledConfig):
    kernels: list[Kernel] = Field(
        [Kernel(power=1.0, temperature=1.0), Kernel(power=0.5, temperature=1.0)],
        min_length=1,
        description="the mixture: power, temperature and weight of each kernel",
    )
    concatenate: bool = Field(False, description="each kernel sees its own part of the dimensions")
    same_side: bool = Field(True, description="other samples of the anchor's own view are negatives too")


@OBJECTIVES.register(
    "kernel-infonce",
    "InfoNCE with a mixture of exponential kernels of the distance",
    paper="Contrastive Learning Is Spectral Clustering On Similarity Graph",
)
class KernelInfoNCE(TiledObjective):
    """See the module's formula. It has no parameters."""

    Config = KernelInfoNCEConfig

    def __init__(self, config: KernelInfoNCEConfig) -> None:
        super().__init__(config)
        self.config = config

    def log_kernel(self, squared: Sequence[Tensor]) -> Tensor:
        """log K from the squared distances that each kernel sees."""
        terms = [
            math.log(kernel.weight) - power(distance, kernel.power) / kernel.temperature
            for kernel, distance in zip(self.config.kernels, squared, strict=True)
        ]
        return torch.stack(terms).logsumexp(0)

    def parts(self, embeddings: Tensor) -> Sequence[Tensor]:
        """The dimensions [n, D] that each kernel sees."""
        return embeddings.chunk(len(self.config.kernels), dim=1)

    def parted_score(self, rows: Tensor, columns: Tensor, _: Known, __: Known) -> Tensor:
        """log K [R, C] where each kernel has its own dimensions."""
        squared = [
            (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)
            for x, y in zip(self.parts(rows), self.parts(columns), strict=True)
        ]
        return self.log_kernel(squared)

    def comparisons(self, views: Sequence[str]) -> list[Comparison]:
        first, second = views[:2]
        pairs = [(first, second), *([(first, first), (second, second)] if self.config.same_side else [])]
        score = self.parted_score if self.config.concatenate else None
        cost = 4 * len(self.config.kernels)
        return [Comparison(*pair, score=score, cost=cost) for pair in pairs]

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        return {} if self.config.concatenate else square_norms(s, list(s.views)[:2])

    def tile(self, t: Tile) -> Reductions:
        count = len(self.config.kernels)
        logits = t.scores if self.config.concatenate else self.log_kernel([squared_distances(t)] * count)
        if t.row_view == t.column_view:
            return {"lse": row_lse(logits)}
        return {"lse": [row_lse(logits), column_lse(logits)]}

    def finish(self, s: Samples) -> Tensor:
        first, second = list(s.views)[:2]
        if self.config.concatenate:
            halves = zip(self.parts(s.views[first]), self.parts(s.views[second]), strict=True)
            own = [(x - y).square().sum(1) for x, y in halves]
        else:
            own = [own_squared_distance(s, first, second)] * len(self.config.kernels)
        return (s["lse", first] + s["lse", second]) / 2 - self.log_kernel(own)
