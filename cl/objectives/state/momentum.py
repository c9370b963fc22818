"""MoCo v3: queries of the towers in training against keys of a slowly moving copy, both from the present batch.

    loss_i     = 2 tau [ ce(a_i, b') + ce(b_i, a') ]
    ce(q_i, k) = logsumexp_j <q_i, k_j> / tau - <q_i, k_i> / tau

x' are the teacher's embeddings; there is no queue. Chen, Xie and He 2021, "An Empirical Study of Training
Self-Supervised Vision Transformers", algorithm 1. The factor 2 tau keeps the size of the gradient when tau changes. The
predictor of the queries belongs to the towers.

Needs the teacher's embeddings (`teachers` in the training config, kind ema): view x by teacher t is the view x_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.tiled import ScaledConfig, ScaledObjective


class MomentumConfig(ScaledConfig):
    learn_temperature: bool = Field(False, description="train the log of the inverse temperature")
    teacher: str = Field("teacher", description="name t of the teacher: its embeddings of view x are the view x_t")


class MomentumObjective(ScaledObjective):
    """Views in training against a teacher's."""

    needs: ClassVar[tuple[str, ...]] = ("teacher views",)

    def __init__(self, config: MomentumConfig, directions: int = 2) -> None:
        super().__init__(config)
        self.suffix, self.directions = f"_{config.teacher}", directions
        if self.view_names is not None:
            self.view_names = [*self.view_names, *(key for _, key in self.queries(self.view_names))]

    def queries(self, views: Sequence[str]) -> list[tuple[str, str]]:
        """(query view, key view): from the first view to the second's keys, and from the second to the first's."""
        first, second = [view for view in views if not view.endswith(self.suffix)][:2]
        return [(first, f"{second}{self.suffix}"), (second, f"{first}{self.suffix}")][: self.directions]


class MoCoV3Config(MomentumConfig):
    temperature: Scheduled = Field(0.2, description="scores are divided by it")


@OBJECTIVES.register(
    "moco-v3",
    "both views against a momentum encoder's keys of the other, from the batch",
    paper="An Empirical Study of Training Self-Supervised Vision Transformers",
)
class MoCoV3(MomentumObjective):
    """See the module's formula."""

    Config = MoCoV3Config

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return self.queries(views)

    def tile(self, t: Tile) -> Reductions:
        return {"lse": row_lse(self.temperature() * t.scores)}

    def finish(self, s: Samples) -> list[Term]:
        scale = self.temperature()
        return [
            Term(2 * (s["lse", query] / scale - s.own(query, key)), s.valid(query, key))
            for query, key in self.queries(list(s.views))
        ]
