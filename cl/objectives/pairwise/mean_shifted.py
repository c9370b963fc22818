"""Mean-shifted contrastive loss: angles are measured around the centre of the data, not around the origin.

    x'     = (x - c) / |x - c|
    loss_i = NT-Xent(a', b')_i + angular_weight (|a_i - c|^2 + |b_i - c|^2)

Reiss and Hoshen 2023, "Mean-Shifted Contrastive Loss for Anomaly Detection". c is the mean of the training embeddings
of the pre-trained model: here the running mean of the first `centre_steps` global batches (both views), constant from
then on; `angular_weight` adds the pull to it (with c of length 1). The encoder starts from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.engine.rule import Reductions, Samples, Tile, column_lse, row_lse
from cl.objectives.base import OBJECTIVES, Outcome
from cl.objectives.schedule import Scheduled
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs

RAW = "raw "


class MeanShiftedConfig(ScaledConfig):
    temperature: Scheduled = Field(0.25, description="initial temperature; scores are divided by it")
    learn_temperature: bool = Field(False, description="train the log of the inverse temperature")
    centre_steps: int = Field(100, ge=1, description="steps whose batches' mean is the centre")
    angular_weight: float = Field(0.0, ge=0, description="weight of the squared distance to the centre's direction")
    dimensions: int | None = Field(None, ge=1, description="size of the embeddings; default: the model's")


@OBJECTIVES.register(
    "mean-shifted",
    "NT-Xent of embeddings seen from the centre of the data",
    paper="Mean-Shifted Contrastive Loss for Anomaly Detection",
)
class MeanShifted(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature, if it is trained."""

    Config = MeanShiftedConfig
    state = ("centre",)
    centre: Tensor
    seen: Tensor

    def __init__(self, config: MeanShiftedConfig) -> None:
        super().__init__(config)
        assert config.dimensions is not None
        self.config = config
        self.sources, self.view_names = config.views, None  # tiles compare shifted views
        self.register_buffer("centre", torch.zeros(config.dimensions))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        names = list(self.sources or pairs.views)[:2]
        present = torch.stack([pairs.view_weights(name) > 0 for name in names]).all(0)
        views = {name: pairs.view(name).to(pairs.dtype).where(present[:, None], 0) for name in names}
        weight = pairs.weights() * present
        if self.training:
            self.move_centre(views, weight, workers)
        centre = self.centre.to(pairs.dtype)
        centre = normalize(centre, dim=0) if self.config.angular_weight else centre
        turned = {RAW + name: view for name, view in views.items()}
        turned |= {name: normalize(view - centre, dim=1) for name, view in views.items()}
        views = {name: turned[name] for name in (*names, *(RAW + name for name in names))}
        return super().forward(replace(pairs, views=views, weight=weight, present={}, tokens={}), workers)

    @torch.no_grad()
    def move_centre(self, views: Mapping[str, Tensor], weight: Tensor, workers: Workers) -> None:
        """Take this step's global batch into the running mean, while the centre is still being found."""
        first, second = views.values()
        sums = workers.all_reduce(torch.cat([(weight[:, None] * (first + second) / 2).sum(0), weight.sum()[None]]))
        total = sums[-1]
        counts = (self.seen < self.config.centre_steps) & (total > 0)
        rate = counts / (self.seen + 1).to(sums.dtype)
        mean = sums[:-1] / total.where(total > 0, 1)
        self.centre += rate * (mean.to(self.centre.dtype) - self.centre)
        self.seen += counts

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        first, second = views[:2]
        return [(first, second), (first, first), (second, second)]

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        if t.row_view == t.column_view:
            return {"lse": row_lse(logits)}
        return {"lse": [row_lse(logits), column_lse(logits)]}

    def finish(self, s: Samples) -> Tensor:
        first, second, *raw = list(s.views)[:4]
        loss = (s["lse", first] + s["lse", second]) / 2 - self.temperature() * s.own(first, second)
        if not self.config.angular_weight:
            return loss
        centre = normalize(self.centre.to(loss.dtype), dim=0)
        spread = sum(((s.views[name] - centre).square().sum(1) for name in raw), torch.zeros_like(loss))
        return loss + self.config.angular_weight * spread
