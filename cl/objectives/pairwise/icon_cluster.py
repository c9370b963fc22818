"""I-Con with learnt clusters: samples are neighbours to the degree to which they share clusters.

    f_ic   = softmax_c(<z_i, p_c> / tau)        the share of cluster c in sample i; p are learnt directions of length 1
    q_ij   proportional to sum_c f_ic f_jc / n_c,   n_c = sum_k f_kc over both views of the global batch
    loss_i = -sum_j p_ij log q_ij

Alshammari et al. 2025, "I-Con: A Unifying Framework for Representation Learning": q is the chance to arrive at j when
one draws a cluster of i and then a member of it. With `p: neighbours` of a frozen model and a `uniform` share it is the
paper's debiased clustering. p, candidates and directions are those of `i-con`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from cl.engine import moments
from cl.engine.collectives import Layout
from cl.engine.normalise import unit
from cl.engine.rule import Samples, Tile
from cl.objectives.base import OBJECTIVES
from cl.objectives.pairwise.icon import Neighbourhood, NeighbourhoodConfig
from cl.pairs import Pairs

LEAST = 1e-12  # below it a share is nothing: of samples without a common cluster, of clusters without members


class IConClusterConfig(NeighbourhoodConfig):
    clusters: int = Field(64, ge=2, description="how many clusters are learnt")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


@OBJECTIVES.register(
    "i-con-cluster",
    "neighbourhoods of samples that share learnt clusters, pulled towards given ones (I-Con's clustering)",
    paper="I-Con: A Unifying Framework for Representation Learning",
)
class IConCluster(Neighbourhood):
    """See the module's formula. Parameters: the directions of the clusters, the log of the inverse temperature."""

    Config = IConClusterConfig
    state = ("prototypes",)
    memory = "batch x clusters"

    def __init__(self, config: IConClusterConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None
        self.directions = nn.Parameter(torch.randn(config.clusters, config.dimensions))

    def learnt(self) -> Sequence[Tensor]:
        """None by the tiles: directions and temperature have made the views, and get their gradient through them."""
        return []

    def derive(self, pairs: Pairs, layout: Layout) -> Pairs:
        """The first two views as shares of clusters, f / sqrt(n), whose inner products are q before it sums to 1."""
        pairs = super().derive(pairs, layout)
        shares, members = {}, torch.zeros((), dtype=pairs.dtype, device=pairs.device)
        for name in list(pairs.views)[:2]:
            alive = (pairs.view_weights(name) > 0)[:, None]
            rows = unit(pairs.view(name).to(pairs.dtype).where(alive, 0))
            share = (self.temperature() * rows @ unit(self.directions).T).softmax(1).where(alive, 0)
            shares[name], members = share, members + share.sum(0)
        factor = moments.total(members, layout.workers).clamp_min(LEAST).rsqrt()
        return replace(pairs, views={**pairs.views, **{name: share * factor for name, share in shares.items()}})

    def logits(self, t: Tile) -> Tensor:
        return t.scores.clamp_min(LEAST).log()

    def own_logit(self, s: Samples) -> Tensor:
        first, second = list(s.views)[:2]
        return s.own(first, second).clamp_min(LEAST).log()
