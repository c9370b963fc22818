"""Mixed anchors: an anchor between two samples has both of their candidates as positives, in proportion.

    m_i    = unit( lambda_i a_i + (1 - lambda_i) a_p(i) )
    loss_i = logsumexp_j <m_i, b_j> / tau - lambda_i <m_i, b_i> / tau - (1 - lambda_i) <m_i, b_p(i)> / tau

p is a random cycle through the samples of all workers. Lee et al. 2021, "i-Mix: A Domain-Agnostic Strategy for
Contrastive Representation Learning", with anchors mixed as embeddings; where the loader mixes pictures (Jiang et
al. 2023, "TiMix: Text-aware Image Mixing for Effective Vision-Language Pre-training"), `share` names the label that
holds lambda_i, the batch's view `partner` holds b_p(i), and nothing is mixed here.

lambda_i is from Beta(a, a), and depends on the seed, the step and the sample alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from cl.engine import randomness
from cl.engine.collectives import Layout, Workers, gather_rows
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.engine.randomness import keys_of
from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.objectives.base import OBJECTIVES
from cl.objectives.negatives.feature_transformation import beta
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs

_PARTNER, _SHARE, _SAMPLE, _CONTENT = "partner", "partner.share", "partner.sample", "partner.content"


class MixupConfig(ScaledConfig):
    beta: int = Field(1, ge=1, description="a of Beta(a, a), the distribution of a sample's share in its mixture")
    share: str | None = Field(
        None,
        description="label with the sample's share in a view that is mixed already; its other part: view `partner`",
    )
    seed: int = Field(0, description="of the shares and the cycle")


@OBJECTIVES.register(
    "mixup",
    "anchors between two samples, both candidates positive in proportion",
    paper="i-Mix: A Domain-Agnostic Strategy for Contrastive Representation Learning",
)
class Mixup(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = MixupConfig

    def __init__(self, config: MixupConfig) -> None:
        super().__init__(config)
        self.config = config
        if self.view_names is not None:
            self.view_names = [*self.view_names, _PARTNER]
        self._read: list[str] = []  # labels that tiles read in this step

    def labels(self) -> list[str]:
        return self._read

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [(views[0], views[1]), *((views[0], name) for name in self.extra)]

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        if self.config.share is None:
            pairs = self._mixed(pairs, workers.layout(len(pairs), pairs.device))
        else:
            pairs = replace(pairs, labels={**pairs.labels, _SHARE: pairs.label(self.config.share)})
        self._read = [name for name in (_SAMPLE, _CONTENT) if name in pairs.labels]
        return super().forward(pairs, workers)

    def _mixed(self, pairs: Pairs, layout: Layout) -> Pairs:
        """The batch with mixed anchors, and what is known of their other parts."""
        first, second = list(self.view_names or pairs.views)[:2]
        weight = pairs.view_weights(first) * (pairs.view_weights(second) > 0)
        place = torch.arange(layout.local.start, layout.local.stop, device=pairs.device)
        key = place if pairs.ids is None else keys_of(pairs.ids)
        partner = self._cycle(layout.gather(key), layout.gather(weight), pairs.clock.step)[layout.local]
        share = beta(self.config.beta, self.config.seed, pairs.clock.step, key, pairs.dtype)
        labels = {**pairs.labels, _SHARE: share, _SAMPLE: partner}
        content = pairs.content_columns()
        if content is not None:
            labels[_CONTENT] = layout.gather(content)[partner]
        alive = (weight > 0)[:, None]
        a, b = (gather_rows(pairs.view(name).where(alive, 0), layout) for name in (first, second))
        mixed = unit(share[:, None] * a[layout.local] + (1 - share[:, None]) * a[partner])
        return replace(pairs, views={first: mixed, second: pairs.view(second), _PARTNER: b[partner]}, labels=labels)

    def _cycle(self, key: Tensor, weight: Tensor, step: int) -> Tensor:
        """[N]: each sample's partner, itself for masked ones; the cycle depends on the samples alone."""
        chance = randomness.uniform(self.config.seed, step, key, key * 0 + 1, dtype=torch.float64)
        cycle = (chance + (weight == 0)).argsort(stable=True)[: int((weight > 0).sum())]
        partner = torch.arange(len(key), device=key.device)
        partner[cycle] = cycle.roll(1)
        return partner

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        if _CONTENT not in self._read or t.columns.content is None:
            return {"lse": row_lse(logits)}
        repeats = (t.row(_CONTENT) == t.columns.content).any(-1)
        return {"lse": row_lse(logits, mask=~repeats | t.positive | (t.row(_SAMPLE) == t.columns.sample))}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.views)[:2]
        scale, share = self.temperature(), s.meta[_SHARE]
        positive = share * s.own(first, second) + (1 - share) * s.own(first, _PARTNER)
        return [Term(s["lse", first] - scale * positive, s.valid(first, second))]
