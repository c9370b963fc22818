"""Contrastive sparse representation: sparse codes of frozen embeddings, reconstructed and contrasted.

    z_k = top_k(relu(W_e (f - b) + b_e)),   f_k = W_d z_k + b
    L   = |f - f_k|^2 + r |f - f_4k|^2 + c L_infonce(normalise z_k of both views)

Wen et al. 2025, "Beyond Matryoshka: Revisiting Sparse Coding for Adaptive Representation": W_e is wide, k
small; the denser code of 4k keeps units alive (r = 1/8), the contrast is between the codes of the two views, which are
not negative. The mean over samples is of squared distances summed over dimensions.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from cl.engine import moments
from cl.engine.collectives import Workers
from cl.engine.exchange import ExchangeChoice, Exchanger
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.engine.sweep import Tiling
from cl.engine.symmetric import symmetric_infonce
from cl.objectives.base import OBJECTIVES
from cl.objectives.moment import MomentConfig, MomentObjective
from cl.objectives.temperature import Temperature, TemperatureConfig
from cl.pairs import Pairs


class SparseCodesConfig(MomentConfig, TemperatureConfig):
    width: int = Field(4096, ge=2, description="dimensions of the codes")
    active: int = Field(32, ge=1, description="k, entries of a code that are not 0")
    dense_weight: float = Field(0.125, ge=0, description="r, weight of the reconstruction from 4 k entries")
    contrast: float = Field(1.0, ge=0, description="c, weight of the contrast between the views' codes")
    exchange: ExchangeChoice = Field("auto", description="how codes of other workers are seen")


@OBJECTIVES.register(
    "sparse-codes",
    "sparse codes of (frozen) embeddings, reconstructed and contrasted (CSR)",
    paper="Beyond Matryoshka: Revisiting Sparse Coding for Adaptive Representation",
)
class SparseCodes(MomentObjective):
    """See the module's formula. Parameters: the sparse auto-encoder."""

    Config = SparseCodesConfig
    memory = "batch x width"

    def __init__(self, config: SparseCodesConfig) -> None:
        super().__init__(config)
        self.config = config
        self.encoder = nn.Linear(self.width, config.width)
        self.decoder = nn.Linear(config.width, self.width)  # its bias is b
        self.temperature = Temperature(config)
        self.exchanger = Exchanger(config.exchange)

    def code(self, rows: Tensor, active: int) -> Tensor:
        """[B, width] with at most `active` entries that are not 0."""
        dense = torch.relu(self.encoder(rows - self.decoder.bias))
        top = dense.topk(min(active, dense.shape[1]), dim=1)
        return torch.zeros_like(dense).scatter(1, top.indices, top.values)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        self.temperature.follow_(pairs.clock)
        rows = self.rows(pairs, workers)
        losses, codes = [], []
        for view in rows.views[:2]:
            sparse, dense = self.code(view, self.config.active), self.code(view, 4 * self.config.active)
            rebuilt = (view - self.decoder(sparse)).square().sum(1)
            losses.append(rebuilt + self.config.dense_weight * (view - self.decoder(dense)).square().sum(1))
            codes.append(unit(sparse))
        loss = moments.replicated(rows.mean(torch.stack(losses).sum(0), workers), workers)
        layout = workers.layout(len(pairs), pairs.device)
        contrast, _, _ = symmetric_infonce(
            codes[0],
            codes[1],
            self.temperature(),
            layout=layout,
            weight=rows.weight,
            content=pairs.content_columns(),
            exchange=self.exchanger(layout.total, codes[0].shape[1], codes[0].element_size(), workers),
            tiling=Tiling(),
        )
        return Outcome(loss + self.config.contrast * contrast, {"reconstruction": loss.detach()})

    def clamp_(self) -> None:
        self.temperature.clamp_()
