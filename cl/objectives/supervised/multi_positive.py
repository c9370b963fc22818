"""Several right candidates for an anchor: its own texts in K languages, more captions, or all of its class.

    l_ik      = <a_i, t_k> / tau
    forward_i = logsumexp_k l_ik - 1/|P(i)| sum_{k in P(i)} l_ik
    back_k    = logsumexp_i l_ik - 1/|P(k)| sum_{i in P(k)} l_ik
    loss      = f mean_i forward_i + (1 - f) mean_i [ 1/K_i sum_{k of i} back_k ]

Nie et al. 2024, "Improving the Consistency in Cross-Lingual Cross-Modal Retrieval with 1-to-K Contrastive Learning":
an anchor (first view) is contrasted with its K_i candidates at once, so that none of them is the pivot,
and each candidate with all anchors. K_i may differ: candidates are the other views, where the sample has them, and
what `extra` names. With `label`, candidates of the anchor's class are positives too: Yang et al. 2022, "Unified
Contrastive Learning in Image-Text-Label Space" (`unicl`), where a sample without a label (below 0) has
itself. With K = 1 and no label it is symmetric InfoNCE.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, Tiler, column_lse, column_sum, row_lse, row_sum
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import ScaledConfig, ScaledObjective


class MultiPositiveConfig(ScaledConfig):
    label: str | None = Field(None, description="label, int64 [B], of samples that are right answers of each other")
    direction: Literal["both", "forward"] = Field("both", description="forward: anchors against candidates alone")


class OneToMany(ScaledObjective):
    """The first view is the anchor; all other views and further embeddings are candidates."""

    def __init__(self, config: MultiPositiveConfig) -> None:
        super().__init__(config)
        self.label, self.both = config.label, config.direction == "both"

    def labels(self) -> Collection[str]:
        return [] if self.label is None else [self.label]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [(views[0], view) for view in views[1:]]

    def positives(self, t: Tile) -> Tensor:
        """[R, C] bool: the anchor's own candidates, and those of its class."""
        if self.label is None or t.columns.role == "negative":
            return t.positive
        row, column = t.row(self.label), t.column(self.label)
        return t.positive | (row == column) & (row >= 0)


@OBJECTIVES.register(
    "multi-positive",
    "an anchor against its K right candidates at once, any number each, both directions (1-to-K)",
    paper="Improving the Consistency in Cross-Lingual Cross-Modal Retrieval with 1-to-K Contrastive Learning",
)
class MultiPositive(OneToMany):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = MultiPositiveConfig
    compares = "one view against any number"

    def passes(self) -> Sequence[Tiler]:
        return [self.tile, self.home] if self.both and self.extra else [self.tile]

    def tile(self, t: Tile) -> Reductions:
        logits, positives = self.temperature() * t.scores, self.positives(t)
        found = {"all": [row_lse(logits)], "agree": [row_sum(logits, mask=positives)]}
        found["count"] = [row_sum(positives.to(logits))]
        if self.both and t.columns.role == "view":
            found["all"].append(column_lse(logits))
            found["agree"].append(column_sum(logits, mask=positives))
            found["count"].append(column_sum(positives.to(logits)))
        return found

    def home(self, t: Tile) -> Reductions:
        """Bring what further candidates lose to the samples that own them."""
        if t.column_view not in self.extra or t.columns.role != "view":
            return {}
        back = t.column("all") - t.column("agree") / t.column("count").clamp_min(1)
        return {
            "back": row_sum(back.expand(t.scores.shape), mask=t.positive),
            "extra": row_sum(t.positive.to(t.scores)),
        }

    def finish(self, s: Samples) -> list[Term]:
        anchor, *others = s.present
        some = s.valid(anchor) & (s["count", anchor] > 0)
        forward = s["all", anchor] - s["agree", anchor] / s["count", anchor].clamp_min(1)
        if not self.both:
            return [Term(forward, valid=some)]
        back, number = torch.zeros_like(forward), torch.zeros_like(forward)
        if ("back", anchor) in s.statistics:
            back, number = s["back", anchor], s["extra", anchor]
        for view in others:
            own = s.valid(anchor, view)
            count = s["count", view].clamp_min(1)
            back = back + (s["all", view] - s["agree", view] / count).where(own, 0)
            number = number + own
        valid = s.valid(anchor) & (number > 0)
        return [Term(forward, valid=some, factor=0.5), Term(back / number.clamp_min(1), valid=valid, factor=0.5)]


class UniCLConfig(MultiPositiveConfig):
    label: str | None = Field("class", description="label, int64 [B]; below 0 for pairs of image and text without one")


@OBJECTIVES.register(
    "unicl",
    "image-text contrast in which all pairs of one class are right (labels and captions in one batch)",
    paper="Unified Contrastive Learning in Image-Text-Label Space",
)
class UniCL(MultiPositive):
    """`multi-positive` by class label."""

    Config = UniCLConfig
    needs = ("class labels",)
