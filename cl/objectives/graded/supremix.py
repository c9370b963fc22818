"""SupReMix: supervised contrast for numbers as labels, with mixtures as harder negatives and positives.

    x_ij   = lambda_ij z_i + (1 - lambda_ij) z_j  for y_j != y_i            hard negatives, lambda from Beta(2, 8)
    p_im   = a z_j + (1 - a) z_k,  y_i - n < y_j < y_i < y_k < y_i + n      hard positives, a y_j + (1 - a) y_k = y_i
    loss_i = log sum_c w_ic exp(<z_i, c> / tau) - mean over the positives of <z_i, p> / tau,   w_ic = 1 + |y_i - y_c|

Wu et al. 2023, "Mixup Your Own Pairs" (Mix-neg, Mix-pos and distance magnifying). i runs over the embeddings of all
views; c over all other embeddings, the x_i. and the p_i.; positives are the sample's own other views, samples with an
equal number, and the p_i.. Where the authors mix every pair of samples about y_i, M pairs are drawn for each sample
here, from the samples of all workers, and mixed in every view. Gradients pass through mixtures to what they are made
of; the authors' program stops them. All mixing depends on the seed, the step and the samples alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field, field_validator
from torch import Tensor

from cl.engine import randomness
from cl.engine.collectives import Layout, gather_rows
from cl.engine.randomness import keys_of
from cl.engine.rule import Comparison, Reductions, Samples, Term, Tile, column_lse, row_lse
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.supervised.labelled import ScaledLabelledConfig, ScaledLabelledObjective
from cl.pairs import Pairs

_MIXED = "mixed."  # views of mixtures: mixed.NUMBER.VIEW
_SOME = "mixed"  # label: 1 where a sample has mixtures


class SupReMixConfig(ScaledLabelledConfig):
    label: str = Field("score", description="label of numbers, [B]")
    temperature: Scheduled = Field(0.3, description="initial temperature; scores are divided by it")
    window: float = Field(1.0, gt=0, description="n, how far from its number the parts of a hard positive may lie")
    mixtures: int = Field(4, ge=0, description="M, hard positives of each sample; 0: none")
    mix_negatives: bool = Field(True, description="mixtures with the anchor are hard negatives")
    beta: tuple[int, int] = Field((2, 8), description="distribution of the anchor's share in a hard negative")
    magnify: bool = Field(True, description="weigh what is not a positive by 1 + the distance of the numbers")
    seed: int = Field(0, description="of the mixtures")

    @field_validator("beta")
    @classmethod
    def _whole(cls, beta: tuple[int, int]) -> tuple[int, int]:
        if min(beta) < 1:
            raise ValueError(f"both numbers of a beta distribution must be at least 1, not {beta}")
        return beta


@OBJECTIVES.register(
    "supremix",
    "supervised contrast on numbers as labels, with mixtures as harder negatives and harder positives",
    paper="Mixup Your Own Pairs",
)
class SupReMix(ScaledLabelledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = SupReMixConfig
    needs = ("numbers as labels",)

    def __init__(self, config: SupReMixConfig) -> None:
        super().__init__(config)
        self.config = config

    def derive(self, pairs: Pairs, layout: Layout) -> Pairs:
        """The batch with each sample's hard positives as further views."""
        pairs = super().derive(pairs, layout)
        number = pairs.label(self.label)
        if number.dim() != 1:
            raise DataError(f"The label {self.label!r} has shape {list(number.shape)}; expected one number a sample.")
        whole = torch.stack([pairs.view_weights(view) > 0 for view in pairs.views]).all(0)
        below, above, share, some = self._partners(pairs, number.to(pairs.dtype), whole, layout)
        views = dict(pairs.views)
        for name, view in pairs.views.items():
            rows = gather_rows(view.where(whole[:, None], 0), layout)
            for m in range(self.config.mixtures):
                part = share[:, m, None].to(rows)
                views[f"{_MIXED}{m}.{name}"] = part * rows[below[:, m]] + (1 - part) * rows[above[:, m]]
        return replace(pairs, views=views, labels={**pairs.labels, _SOME: some.long()})

    def _partners(
        self, pairs: Pairs, number: Tensor, whole: Tensor, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each local sample: the places j and k of the parts in the global batch, the share of j, all [B, M], and
        whether there are any [B]. Only samples that have all views are parts.
        """
        place = torch.arange(layout.local.start, layout.local.stop, device=pairs.device)
        key = place if pairs.ids is None else keys_of(pairs.ids)
        everyone, keys, known = (layout.gather(value) for value in (number, key, whole))
        order = keys.argsort(stable=True)
        order = order[everyone[order].argsort(stable=True)]
        order = order[known[order]]
        ranked, window, streams = everyone[order], self.config.window, torch.arange(self.config.mixtures)

        def drawn(first: Tensor, last: Tensor, side: int) -> Tensor:
            """[B, M] places of samples from the ranks `first` to before `last`."""
            counters = key[:, None], streams.to(key)[None], torch.full_like(key, side)[:, None]
            chance = randomness.uniform(self.config.seed, pairs.clock.step, *counters, dtype=number.dtype)
            rank = first[:, None] + (chance * (last - first)[:, None]).long()
            return order[rank.clamp(0, max(len(order) - 1, 0))] if len(order) else rank * 0

        lower = torch.searchsorted(ranked, number - window, right=True), torch.searchsorted(ranked, number)
        upper = torch.searchsorted(ranked, number, right=True), torch.searchsorted(ranked, number + window)
        some = (lower[1] > lower[0]) & (upper[1] > upper[0])
        below, above = drawn(*lower, side=0), drawn(*upper, side=1)
        gap = (everyone[above] - everyone[below]).where(some[:, None], 1)
        share = (everyone[above] - number[:, None]) / gap
        return below, above, share.where(some[:, None], 0), some

    def comparisons(self, views: Sequence[str]) -> Sequence[tuple[str, str] | Comparison]:
        return super().comparisons([view for view in views if not view.startswith(_MIXED)])

    def positives(self, t: Tile) -> Tensor:
        if t.columns.role == "negative":
            return t.positive
        return t.positive | (t.row(self.label) == t.column(self.label))

    def tile(self, t: Tile) -> Reductions:
        scale, positives = self.temperature(), self.positives(t)
        logits = scale * t.scores
        if t.columns.role == "negative":
            return {"real": self.lse(t, logits)}
        gap = (t.row(self.label) - t.column(self.label)).abs().to(logits)
        found = {
            "real": self.lse(t, logits + gap.log1p() if self.config.magnify else logits),
            "agree": self.sum(t, logits, mask=positives),
            "count": self.sum(t, positives.to(logits)),
        }
        if self.config.mix_negatives:
            rows, columns = t.row("key"), t.column("key")
            by_row = self._mixed(t, gap, scale, self._share(t, rows, columns))
            found["hard"] = [row_lse(by_row, over="negatives", mask=gap > 0)]
            if self.columns_are_anchors(t):
                by_column = self._mixed(t, gap, scale, self._share(t, columns, rows))
                found["hard"].append(column_lse(by_column, over="negatives", mask=gap > 0))
        return found

    def _mixed(self, t: Tile, gap: Tensor, scale: Tensor, share: Tensor) -> Tensor:
        """[R, C]: the weighted logit of each anchor and its mixture with each candidate; <z_i, z_i> is 1."""
        logits = scale * (share + (1 - share) * t.scores)
        return logits + ((1 - share) * gap).log1p() if self.config.magnify else logits

    def _share(self, t: Tile, anchors: Tensor, others: Tensor) -> Tensor:
        """[R, C] from Beta(a, b): the a-th smallest of a + b - 1 even numbers."""
        a, b = self.config.beta
        rest = torch.ones((), dtype=t.scores.dtype, device=t.scores.device)
        for place in range(a):
            seed = self.config.seed + 2 + place
            chance = randomness.uniform(seed, t.clock.step, anchors, others, dtype=t.scores.dtype)
            rest = rest * (1 - chance) ** (1 / (a + b - 1 - place))
        return 1 - rest

    def finish(self, s: Samples) -> list[Term]:
        names = [view for view in s.present if not view.startswith(_MIXED)]
        mixtures = [view for view in s.views if view.startswith(_MIXED)]
        some = s.meta[_SOME] > 0
        terms = []
        for view in names:
            logits = [self.temperature() * s.own(view, mixture) for mixture in mixtures]
            parts = [s["real", view], *([s["hard", view]] if self.config.mix_negatives else [])]
            parts += [logit.masked_fill(~some, -torch.inf) for logit in logits]
            agree, count = s["agree", view], s["count", view] + len(mixtures) * some
            agree = agree + sum(logits, torch.zeros_like(agree)).where(some, 0)
            valid = s.valid(view) & (count > 0)
            lse = torch.stack(parts, 1).masked_fill(~valid[:, None], 0).logsumexp(1)
            terms.append(Term(lse - agree / count.clamp_min(1), valid, factor=1 / len(names)))
        return terms
