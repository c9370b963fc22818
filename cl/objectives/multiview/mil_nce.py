"""MIL-NCE: an anchor has a bag of candidates of which at least one is right.

    loss_i = log( sum_{k in P(i)} exp l_ik + sum_{k in N(i)} exp l_ik + sum_{k of i} sum_{j not of k} exp l_jk )
             - log sum_{k in P(i)} exp l_ik,                                                   l_ik = <a_i, t_k> / tau

Miech et al. 2020, "End-to-End Learning of Visual Representations from Uncurated Instructional Videos": the sum
over the bag is inside of the log, so the loss picks its own positives. P(i) are the sample's candidates (its other
views and whatever `extra` names: the narrations around a clip) and, with `label`, those of its group; N(i) are all
other candidates; the last sum is over the negatives of the sample's candidates and is left out by `direction:
forward`. The authors' program counts each positive twice in the first log; here it counts once, as in the equation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cl.engine.rule import Reductions, Samples, Term, Tile, Tiler, column_lse, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.supervised.multi_positive import MultiPositiveConfig, OneToMany


@OBJECTIVES.register(
    "mil-nce",
    "a bag of candidates for each anchor, any of which may be right (multiple instances)",
    paper="End-to-End Learning of Visual Representations from Uncurated Instructional Videos",
)
class MilNCE(OneToMany):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = MultiPositiveConfig
    compares = "one view against any number"

    def passes(self) -> Sequence[Tiler]:
        return [self.tile, self.home] if self.both and self.extra else [self.tile]

    def tile(self, t: Tile) -> Reductions:
        logits, positives = self.temperature() * t.scores, self.positives(t)
        found = {"all": [row_lse(logits)], "bag": [row_lse(logits, mask=positives)]}
        if self.both and t.columns.role == "view":
            found["others"] = [column_lse(logits, mask=~positives)]
        return found

    def home(self, t: Tile) -> Reductions:
        """Bring the negatives of further candidates to the samples that own them."""
        if t.column_view not in self.extra or t.columns.role != "view":
            return {}
        return {"others": row_lse(t.column("others").expand(t.scores.shape), mask=t.positive)}

    def finish(self, s: Samples) -> list[Term]:
        anchor, *others = s.present
        sums = [s["all", anchor]]
        if self.both:
            if ("others", anchor) in s.statistics:
                sums.append(s["others", anchor])
            sums += [s["others", view].where(s.valid(view), -torch.inf) for view in others]
        bag = s["bag", anchor]
        return [Term(torch.stack(sums).logsumexp(0) - bag, valid=s.valid(anchor) & bag.isfinite())]
