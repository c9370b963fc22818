"""k-positive contrast: of an anchor's class, k positives drawn at random, so that frequent classes do not rule.

    loss_i = -1/|V(i)| sum_{p in V(i)} log( exp l_ip / sum_{a in A(i)} exp l_ia ),      l_ij = <z_i, z_j> / tau

Kang et al. 2021, "Exploring Balanced Feature Spaces for Representation Learning": V(i) are the other
views of the sample and k embeddings of other samples of its class (all where there are fewer), drawn anew at each
step, by seed, step and sample ids. k = 0 is NT-Xent, a large k SupCon. The paper draws from the queue of a momentum
encoder; here it is the batch of all workers.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, Tiler, column_sum, column_top, row_sum, row_top
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.labelled import ScaledLabelledConfig, ScaledLabelledObjective, each_anchor


class KCLConfig(ScaledLabelledConfig):
    k: int = Field(6, ge=0, description="positives that are drawn for an anchor beside its own other views")
    seed: int = Field(0, description="of the draw")


@OBJECTIVES.register(
    "kcl",
    "SupCon with at most k positives drawn for each anchor (long-tailed classes)",
    paper="Exploring Balanced Feature Spaces for Representation Learning",
)
class KPositives(ScaledLabelledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = KCLConfig
    stopped = frozenset({"drawn"})

    def __init__(self, config: KCLConfig) -> None:
        super().__init__(config)
        self.k, self.seed = config.k, config.seed

    def passes(self) -> Sequence[Tiler]:
        return [self.draw, self.tile] if self.k else [self.tile]

    def lots(self, t: Tile) -> Tensor:
        """[R, C] in [0, 1); the k largest of an anchor win. The views' names are part of the seed, so that the views of
        a sample are drawn one by one.
        """
        place = sum(ord(c) * (n + 1) for n, c in enumerate(f"{t.row_view} {t.column_view}"))
        return t.uniform(self.seed * 100_003 + place)

    def draw(self, t: Tile) -> Reductions:
        lots, others = self.lots(t), self.positives(t) & ~t.positive
        found = [row_top(lots, self.k, over="candidates", mask=others)]
        if self.columns_are_anchors(t):
            found.append(column_top(lots, self.k, over="candidates", mask=others))
        return {"drawn": found}

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        found = {"all": self.lse(t, logits)}
        if not self.k:
            return {**found, "agree": self.sum(t, logits, mask=t.positive), "count": self.sum(t, t.positive.to(logits))}
        lots, others = self.lots(t), self.positives(t) & ~t.positive
        # The statistic holds the k largest lots in descending order; its last one is the price of admission.
        by_row = t.positive | others & (lots >= t.row("drawn")[..., -1])
        agree, count = [row_sum(logits, mask=by_row)], [row_sum(by_row.to(logits))]
        if self.columns_are_anchors(t):
            by_column = t.positive | others & (lots >= t.column("drawn")[..., -1])
            agree.append(column_sum(logits, mask=by_column))
            count.append(column_sum(by_column.to(logits)))
        return {**found, "agree": agree, "count": count}

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            return s["all", view] - s["agree", view] / s["count", view].clamp_min(1), s["count", view] > 0

        return each_anchor(s, loss)
