"""Supervised contrast for long-tailed classes: every class weighs the same, or has a learnt centre.

Balanced contrastive learning (`bcl`), with a learnt prototype c_y for each class of the data:

    loss_i = log sum_{classes y} 1/n_y(i) sum_{a in A(i) u C, of y} exp l_ia - 1/|P(i)| sum_{p in P(i)} l_ip

Zhu et al. 2022, "Balanced Contrastive Learning for Long-Tailed Visual Recognition": n_y(i) is the number
of embeddings of class y but i itself, the prototype included, so that a frequent class repels no more than a rare
one, and every class is in every batch. P(i) holds the prototype of the own class. l_ij = <z_i, z_j> / tau; prototypes
have length 1.

Parametric contrastive learning (`paco`), with centres that are not normalised and have no temperature:

    loss_i = -1/W sum_{p in P(i) u {c_y(i)}} w_p log( exp l_ip / sum_{a in A(i) u C} exp l_ia ),   l_ic = <z_i, c>

Cui et al. 2021, "Parametric Contrastive Learning": w_p = alpha for samples and 1 for the own centre, W
their sum. The paper adds a momentum encoder with a queue, which a training config gives by `teachers`.

A sample with unknown class (below 0) has no prototype.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from cl.engine.rule import Reductions, Samples, Term, Tile, Tiler, column_lse, column_sum, row_lse
from cl.engine.side import Side
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.labelled import PROTOTYPES, ScaledLabelledConfig, ScaledLabelledObjective, each_anchor
from cl.objectives.supervised.prototypes import ClassPrototypes
from cl.pairs import Pairs


class PrototypeConfig(ScaledLabelledConfig):
    classes: int = Field(ge=1, description="number of classes of the data, not of the batch")
    dimensions: int | None = Field(None, ge=1, description="of the embeddings; default: those of the model")


class PrototypeObjective(ScaledLabelledObjective):
    """Supervised contrast with prototypes among the candidates."""

    needs = ("class labels",)
    state = ("prototypes",)

    def __init__(self, config: PrototypeConfig, normalised: bool) -> None:
        super().__init__(config)
        assert config.dimensions is not None  # filled in by `build`
        self.prototypes = ClassPrototypes(config.classes, config.dimensions, normalised=normalised)

    def constants(self, pairs: Pairs) -> list[Side]:
        return [self.prototypes.side(pairs, self.label)]

    def learnt(self) -> Sequence[Tensor]:
        """Without the prototypes, whose gradient is that of their side."""
        return [p for p in self.parameters() if p is not self.prototypes.vectors]


class BalancedConfig(PrototypeConfig):
    extra: list[str] = Field([], max_length=0, description="none: further embeddings have no class to be counted in")


@OBJECTIVES.register(
    "bcl",
    "SupCon in which every class weighs the same in the sum, with a learnt prototype a class",
    paper="Balanced Contrastive Learning for Long-Tailed Visual Recognition",
)
class BalancedContrast(PrototypeObjective):
    """See the module's formula. Parameters: prototypes [classes, D], and the log of the inverse temperature."""

    Config = BalancedConfig
    stopped = frozenset({"members"})

    def __init__(self, config: BalancedConfig) -> None:
        super().__init__(config, normalised=True)

    def passes(self) -> Sequence[Tiler]:
        return [self.sizes, self.tile]

    def sizes(self, t: Tile) -> Reductions:
        """How many other embeddings are of its class: for embeddings, and for prototypes."""
        others = self.positives(t).to(t.scores)
        if t.column_view == PROTOTYPES:
            return {"members": column_sum(others, over="all")}
        return {"members": self.sum(t, others, over="all")}

    def tile(self, t: Tile) -> Reductions:
        logits, positives = self.temperature() * t.scores, self.positives(t)
        # A class is its embeddings and its prototype, but the anchor itself.
        known = t.column(self.label) >= 0
        size = t.column("members") + 1 + (known & (t.columns.sample >= 0)).to(logits) - positives.to(logits)
        every = [row_lse(logits - size.clamp_min(1).log())]
        if self.columns_are_anchors(t):
            size = t.row("members") + 1 + (t.row(self.label) >= 0).to(logits) - positives.to(logits)
            every.append(column_lse(logits - size.clamp_min(1).log()))
        return {
            "all": every,
            "agree": self.sum(t, logits, mask=positives),
            "count": self.sum(t, positives.to(logits)),
        }

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            return s["all", view] - s["agree", view] / s["count", view].clamp_min(1), s["count", view] > 0

        return each_anchor(s, loss)


class ParametricConfig(PrototypeConfig):
    alpha: float = Field(0.05, ge=0, description="weight of a positive sample beside that of the own centre, 1")


@OBJECTIVES.register(
    "paco",
    "SupCon with learnt class centres among the candidates, which weigh more than samples",
    paper="Parametric Contrastive Learning",
)
class ParametricContrast(PrototypeObjective):
    """See the module's formula. Parameters: centres [classes, D], and the log of the inverse temperature."""

    Config = ParametricConfig

    def __init__(self, config: ParametricConfig) -> None:
        super().__init__(config, normalised=False)
        self.alpha = config.alpha

    def tile(self, t: Tile) -> Reductions:
        centres = t.column_view == PROTOTYPES
        logits, positives = t.scores if centres else self.temperature() * t.scores, self.positives(t)
        weight = positives.to(logits) * (1 if centres else self.alpha)
        return {"all": self.lse(t, logits), "agree": self.sum(t, weight * logits), "weight": self.sum(t, weight)}

    def finish(self, s: Samples) -> list[Term]:
        def loss(view: str) -> tuple[Tensor, Tensor]:
            weight, some = s["weight", view], s["weight", view] > 0
            return s["all", view] - s["agree", view] / weight.where(some, 1), some

        return each_anchor(s, loss)
