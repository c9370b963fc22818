"""Time Control: the middle of a document lies on a Brownian bridge between its start and its end.

    d_ij   = -|x_j - (1 - t_i / T_i) s_i - (t_i / T_i) e_i|^2 / (2 sigma_i^2),   sigma_i^2 = t_i (T_i - t_i) / T_i
    loss_i = log sum_j exp d_ij - d_ii

Wang et al. 2022, "Language Modeling via Stochastic Processes": s, x, e are the first three views (start,
middle, end), t of T is the place of the middle among the steps from start to end, from a label [B, 2] of numbers with 0
< t < T. Candidates j are the middles of all workers' samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.collectives import Workers
from cl.engine.rule import Reductions, Samples, Tile, row_lse
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES, Outcome
from cl.objectives.pairwise.distance import own_squared_distance, square_norms, squared_distances
from cl.objectives.tiled import TiledConfig, TiledObjective
from cl.pairs import Pairs


class BrownianBridgeConfig(TiledConfig):
    label: str = Field("time", description="label [B, 2]: the place t of the middle, and the place T of the end")


@OBJECTIVES.register(
    "brownian-bridge",
    "the middle of a document, picked by its density on a Brownian bridge from start to end (Time Control)",
    paper="Language Modeling via Stochastic Processes",
)
class BrownianBridge(TiledObjective):
    """See the module's formula. It has no parameters."""

    Config = BrownianBridgeConfig
    compares = "three views: start, middle, end"
    needs = ("places in time",)

    def __init__(self, config: BrownianBridgeConfig) -> None:
        super().__init__(config)
        self.label = config.label
        self.sources, self.view_names = config.views, None  # tiles compare bridges with middles

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        names = list(self.sources or pairs.views)[:3]
        if len(names) < 3:
            raise DataError(f"A Brownian bridge needs three views (start, middle, end); the batch has {len(names)}.")
        present = torch.stack([pairs.view_weights(name) > 0 for name in names]).all(0)
        start, middle, end = (pairs.view(name).to(pairs.dtype).where(present[:, None], 0) for name in names)
        time = pairs.label(self.label).to(pairs.dtype)
        if time.dim() != 2 or time.shape[1] != 2:
            raise DataError(f"The label {self.label!r} has shape {list(time.shape)}; expected [samples, 2], t and T.")
        place, last = time.where(present[:, None], time.new_tensor([1.0, 2.0])).unbind(1)
        if not bool(((place > 0) & (place < last)).all()):
            raise DataError(f"The label {self.label!r} holds a place t of the middle outside of 0 < t < T.")
        share = (place / last)[:, None]
        bridge = (1 - share) * start + share * end
        precision = last / (2 * place * (last - place))
        views, labels = {"bridge": bridge, "middle": middle}, {**pairs.labels, "precision": precision}
        weight = pairs.weights() * present
        return super().forward(
            replace(pairs, views=views, labels=labels, weight=weight, present={}, tokens={}), workers
        )

    def labels(self) -> list[str]:
        return ["precision"]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [("bridge", "middle")]

    def inputs(self, s: Samples) -> dict[tuple[str, str], Tensor]:
        return square_norms(s, ["bridge", "middle"])

    def tile(self, t: Tile) -> Reductions:
        return {"lse": row_lse(-t.row("precision") * squared_distances(t))}

    def finish(self, s: Samples) -> Tensor:
        return s["lse"] + s.meta["precision"] * own_squared_distance(s, "bridge", "middle")
