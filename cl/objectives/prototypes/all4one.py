"""All4One: the nearest neighbour, several neighbours read by attention, and features that are not redundant.

    n_v    the k elements of the queue most similar to m_v;  c_v = T(n_v),  d_v = T( q2(z_v), n_v but for the last )
    L_nn   = [ ce(n_a1, q1(z_b)) + ce(n_b1, q1(z_a)) ] / 2        neighbour contrast
    L_cen  = [ ce(c_a, d_b) + ce(c_b, d_a) ] / 2                  centroid contrast
    L_feat = 5 [ rms (C_dd - 1) + rms C_de ]  over C = m_a^T z_b and m_b^T z_a, whose columns have length 1
    L      = w_nn L_nn + w_cen L_cen + w_feat L_feat

Estepa et al. 2023, "All4One: Symbiotic Neighbour Contrastive Learning via Self-Attention and Redundancy Reduction". z_v
are the projected views, m_v those of a teacher (the projector's moving average on a teacher's views), q1 and q2
predictors, T a transformer whose answer stands at the first place; ce(x, y) is InfoNCE of x_i against all y_j of the
global batch, both of length 1. The queue holds the m_a of earlier batches. Needs teacher views (`teachers` of kind ema
in the training config).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from cl.engine import moments
from cl.engine.collectives import Layout, Workers
from cl.engine.exchange import ExchangeChoice, Exchanger
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.engine.sweep import Tiling
from cl.engine.symmetric import symmetric_infonce
from cl.memory.queue import Queue
from cl.objectives.base import OBJECTIVES
from cl.objectives.heads import Head
from cl.objectives.moment import MomentConfig, MomentObjective, Rows
from cl.objectives.moving import MovingAverage
from cl.objectives.pairwise.distance import root
from cl.objectives.prototypes.neighbours import NeighbourAttention, nearest
from cl.objectives.schedule import Scheduled, value_at
from cl.objectives.temperature import Temperature, TemperatureConfig
from cl.pairs import Pairs


class All4OneConfig(MomentConfig, TemperatureConfig):
    temperature: Scheduled = Field(0.2, description="scores are divided by it; a number or a ramp")
    learn_temperature: bool = Field(False, description="train the log of the inverse temperature")
    teacher_views: list[str] = Field(
        ["a_teacher", "b_teacher"],
        min_length=2,
        max_length=2,
        description="the teacher's views, in the order of `views`",
    )
    momentum: Scheduled = Field(0.99, description="of the projector's moving average; a number or a ramp")
    queue: int = Field(98304, ge=1, description="earlier embeddings among which neighbours are sought")
    neighbours: int = Field(5, ge=2, description="k, how many are read together")
    predictor: list[int] = Field([4096], description="hidden widths of both predictors")
    layers: int = Field(3, ge=1, description="of the transformer T")
    heads: int = Field(8, ge=1, description="of the transformer T")
    neighbour_weight: float = Field(0.5, ge=0, description="w_nn")
    centroid_weight: float = Field(0.5, ge=0, description="w_cen")
    feature_weight: float = Field(0.5, ge=0, description="w_feat")
    exchange: ExchangeChoice = Field("auto", description="how candidates of other workers are seen")
    tile_rows: int = Field(0, ge=0, description="anchors a tile; 0: by device")
    tile_columns: int = Field(0, ge=0, description="candidates a tile; 0: by device")


@OBJECTIVES.register(
    "all4one",
    "nearest neighbour, an attended centroid of several neighbours, and decorrelated features at once",
    paper="All4One: Symbiotic Neighbour Contrastive Learning via Self-Attention and Redundancy Reduction",
)
class All4One(MomentObjective):
    """See the module's formula. Parameters: projector, both predictors, the transformer."""

    Config = All4OneConfig
    needs = ("teacher views",)
    state = ("queue", "the projector's moving average")
    memory = "(batch + queue) x dim + dim x dim"

    def __init__(self, config: All4OneConfig) -> None:
        super().__init__(config)
        self.config = config
        self.temperature = Temperature(config)
        widths = [self.width, *config.predictor, self.width]
        self.predictor, self.second_predictor = Head(widths), Head(widths)
        self.attention = NeighbourAttention(self.width, config.layers, config.heads)
        self.slow = MovingAverage(self.projector) if self.projector is not None else None
        self.queue = Queue(config.queue, self.width)
        self.exchanger = Exchanger(config.exchange)
        self.tiling = Tiling(config.tile_rows, config.tile_columns)

    def names(self, pairs: Pairs) -> list[str]:
        return [name for name in super().names(pairs) if name not in self.config.teacher_views][:2]

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        self.temperature.follow_(pairs.clock)
        rows = self.rows(pairs, workers)
        layout = workers.layout(len(pairs), pairs.device)
        targets = self._targets(pairs, rows, workers)
        known = [nearest(self.queue, target, rows.weight, self.config.neighbours) for target in targets]
        near = [each[:, 0] for each in known]
        predicted = [self.predictor(view, rows.weight, workers) for view in rows.views]
        centroids, shifted = [self.attention(each) for each in known], []
        for view, each in zip(rows.views, known, strict=True):
            own = self.second_predictor(view, rows.weight, workers)[:, None]
            shifted.append(self.attention(torch.cat([own, each[:, :-1]], 1)))
        features = moments.replicated(self.redundancy(rows, targets, workers), workers)
        config = self.config
        loss = (
            config.neighbour_weight * self.contrast(near, predicted, pairs, rows, layout)
            + config.centroid_weight * self.contrast(centroids, shifted, pairs, rows, layout)
            + config.feature_weight * features
        )
        if self.training and torch.is_grad_enabled():
            self.queue.push(targets[0], None, rows.weight, layout)
        return Outcome(loss, dict(self.measures()))

    def contrast(
        self, anchors: list[Tensor], candidates: list[Tensor], pairs: Pairs, rows: Rows, layout: Layout
    ) -> Tensor:
        """The mean of InfoNCE from the first view's anchors to the second's candidates and the other way round."""
        width, size = anchors[0].shape[1], anchors[0].element_size()
        losses = []
        for anchor, other in zip(anchors, candidates[::-1], strict=True):
            loss, _, _ = symmetric_infonce(
                unit(anchor),
                unit(other),
                self.temperature(),
                layout=layout,
                weight=rows.weight,
                content=pairs.content_columns(),
                forward_share=1.0,
                exchange=self.exchanger(layout.total, width, size, layout.workers),
                tiling=self.tiling,
            )
            losses.append(loss / 2)
        return losses[0] + losses[1]

    def redundancy(self, rows: Rows, targets: list[Tensor], workers: Workers) -> Tensor:
        """L_feat from moments of the global batch."""
        own, others = torch.zeros_like(rows.weight.sum()), torch.zeros_like(rows.weight.sum())
        for target, view in zip(targets, rows.views[::-1], strict=True):
            left, right = (columns / self._lengths(columns, rows, workers) for columns in (target, view))
            matrix = moments.total((rows.weight[:, None] * left).T @ right, workers)
            away = matrix - torch.eye(self.width, dtype=matrix.dtype, device=matrix.device)
            apart = away.square()
            own = own + apart.diagonal().mean() / 2
            others = others + (apart.sum() - apart.diagonal().sum()) / max(self.width * (self.width - 1), 1) / 2
        return 5 * (root(own) + root(others))

    def _lengths(self, columns: Tensor, rows: Rows, workers: Workers) -> Tensor:
        """[D]: the length of each column over all workers, 1 where it is zero."""
        square = moments.total((rows.weight[:, None] * columns.square()).sum(0), workers)
        return square.where(square > 0, 1).sqrt()

    @torch.no_grad()
    def _targets(self, pairs: Pairs, rows: Rows, workers: Workers) -> list[Tensor]:
        """m of both views [B, D], of length 1."""
        alive = (rows.weight > 0)[:, None]
        views = [pairs.view(name).to(pairs.dtype).where(alive, 0) for name in self.config.teacher_views]
        if self.slow is None or self.projector is None:
            return [unit(view) for view in views]
        if self.training:
            self.slow.follow(self.projector, value_at(self.config.momentum, pairs.clock))
        return [unit(self.slow(view, rows.weight, workers)).where(alive, 0) for view in views]

    def measures(self) -> Mapping[str, Tensor]:
        return {"logit_scale": self.temperature().detach()}

    def clamp_(self) -> None:
        self.temperature.clamp_()
