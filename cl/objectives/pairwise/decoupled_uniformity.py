"""Decoupled uniformity: the centres of the samples' views are spread, which aligns the views by itself.

    loss = log mean_{i != j} exp(-t |m_i - m_j|^2),   m_i = mean of the views of sample i

Dufumier et al. 2023, "Integrating Prior Knowledge in Contrastive Learning with Kernel" (t = 1). With a kernel of prior
knowledge the centres are conditional mean embeddings, estimated over the global batch:

    m_i = sum_k alpha_ki (mean of the views of k),   alpha = (K + n lambda I)^-1 K,   K_ik = exp(-|y_i - y_k|^2 / 2 s^2)

y is a label: an attribute, or the embedding of another model. The kernel needs memory of batch^2; without it the
centres are each sample's own and memory is batch x dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.collectives import Layout, Workers, gather_rows
from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse, row_sum
from cl.objectives.base import OBJECTIVES, Outcome
from cl.objectives.pairwise.distance import square_norms, squared_distances
from cl.objectives.tiled import TiledConfig, TiledObjective
from cl.pairs import Pairs


class DecoupledUniformityConfig(TiledConfig):
    t: float = Field(1.0, gt=0, le=20, description="of the Gaussian potential exp(-t d^2)")
    label: str | None = Field(None, description="label with prior knowledge of each sample (numbers); none: no kernel")
    bandwidth: float = Field(1.0, gt=0, description="s of the Gaussian kernel of the label")
    ridge: float = Field(0.01, gt=0, description="lambda of the inverse")


@OBJECTIVES.register(
    "decoupled-uniformity",
    "uniformity of the centres of each sample's views, smoothed by a kernel of prior knowledge",
    paper="Integrating Prior Knowledge in Contrastive Learning with Kernel",
)
class DecoupledUniformity(TiledObjective):
    """See the module's formula. It has no parameters."""

    Config = DecoupledUniformityConfig
    compares = "one or more views"
    memory = "batch x dim; batch^2 with a kernel"

    def __init__(self, config: DecoupledUniformityConfig) -> None:
        super().__init__(config)
        self.config = config
        self.sources, self.view_names = config.views, None  # tiles compare centres

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        names = list(self.sources or pairs.views)
        present = torch.stack([pairs.view_weights(name) > 0 for name in names]).all(0)
        views = [pairs.view(name).to(pairs.dtype).where(present[:, None], 0) for name in names]
        centre = torch.stack(views).mean(0)
        if self.config.label is not None:
            centre = self.smoothed(centre, pairs.label(self.config.label), present, workers)
        weight = pairs.weights() * present
        return super().forward(replace(pairs, views={"centre": centre}, weight=weight, present={}, tokens={}), workers)

    def smoothed(self, centre: Tensor, label: Tensor, present: Tensor, workers: Workers) -> Tensor:
        """[B, D]: the conditional mean embeddings of the local samples, over all workers' samples."""
        layout: Layout = workers.layout(len(centre), centre.device)
        everyone = layout.gather(present)
        known = (label[:, None] if label.dim() == 1 else label).to(centre.dtype)
        others = layout.gather(known)[everyone]
        if not len(others):
            return centre
        kernel = (-torch.cdist(others, others).square() / (2 * self.config.bandwidth**2)).exp()
        ridge = len(others) * self.config.ridge * torch.eye(len(others), dtype=kernel.dtype, device=kernel.device)
        alpha = torch.linalg.solve(kernel + ridge, kernel)  # symmetric, as both factors commute
        mine = torch.zeros_like(everyone)
        mine[layout.local] = True
        found = alpha[mine[everyone]] @ gather_rows(centre, layout)[everyone]
        return centre.new_zeros(centre.shape).index_put((present.nonzero()[:, 0],), found)

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [("centre", "centre")]

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        return square_norms(s, ["centre"])

    def tile(self, t: Tile) -> Reductions:
        distance = squared_distances(t)
        return {
            "potential": row_lse(-self.config.t * distance, over="negatives"),
            "others": row_sum(torch.ones_like(distance), over="negatives"),
        }

    def finish(self, s: Samples) -> list[Term]:
        others = s["others"]
        return [Term((s["potential"] - others.clamp_min(1).log()).exp(), others > 0)]

    def combine(self, means: Tensor) -> Tensor:
        # A batch without pairs has no potential, and no uniformity.
        return means.where(means > 0, 1).log().sum()
