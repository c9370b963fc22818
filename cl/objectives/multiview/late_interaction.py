"""Late interaction: every token of one side looks for its best token on the other.

    s_ij   = mean_t max_r <a_it, b_jr> / tau       (`mean`; FILIP)      or the sum over t (`sum`; ColBERT)
    loss_i = f (logsumexp_j s(a_i, b_j) - s(a_i, b_i)) + (1 - f) (logsumexp_j s(b_i, a_j) - s(b_i, a_i))

Yao et al. 2021, "FILIP: Fine-grained Interactive Language-Image Pre-Training": t runs over the anchor's
own tokens, so the two directions have different scores; f = 1/2. Khattab and Zaharia 2020, "ColBERT: Efficient and
Effective Passage Search via Contextualized Late Interaction over BERT": the sum over the query's tokens, f =
1. Views are token-wise [B, T, D]; padding is given by `Pairs.tokens`. Tiles shrink by the number of token pairs, so
memory does not grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.collectives import Layout
from cl.engine.rule import Comparison, Known, Reductions, Samples, Term, Tile, row_lse, row_sum
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class LateInteractionConfig(ScaledConfig):
    pool: Literal["mean", "sum"] = Field("mean", description="over the tokens of the anchor")
    direction: Literal["both", "forward"] = Field("both", description="forward: first view against second alone")
    extra: list[str] = Field([], max_length=0, description="none: further embeddings are not token-wise")


@OBJECTIVES.register(
    "filip",
    "token-wise late interaction, both directions (each token's best match, averaged)",
    paper="FILIP: Fine-grained Interactive Language-Image Pre-Training",
)
class LateInteraction(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = LateInteractionConfig
    compares = "two token-wise views"

    def __init__(self, config: LateInteractionConfig) -> None:
        super().__init__(config)
        self.mean, self.both = config.pool == "mean", config.direction == "both"
        self.cost = 1

    def derive(self, pairs: Pairs, layout: Layout) -> Pairs:
        pairs = super().derive(pairs, layout)
        for name, view in list(pairs.views.items())[:2]:
            if view.dim() != 3:
                raise DataError(
                    f"View {name!r} has shape {list(view.shape)}; late interaction compares tokens, [samples, tokens, "
                    "dimensions]."
                )
        first, second = list(pairs.views.values())[:2]
        self.cost = max(first.shape[1] * second.shape[1], 1)
        return pairs

    def comparisons(self, views: Sequence[str]) -> list[Comparison]:
        pairs = [(views[0], views[1]), (views[1], views[0])]
        return [Comparison(*each, score=self.score, cost=self.cost) for each in pairs[: 2 if self.both else 1]]

    def score(self, rows: Tensor, columns: Tensor, known_rows: Known, known_columns: Known) -> Tensor:
        """[R, C]: each token's best match, pooled over the real tokens of the row; a side without tokens scores 0."""
        real, there = known_rows.meta["tokens"], known_columns.meta["tokens"]
        products = torch.einsum("rtd,csd->rcts", rows, columns).masked_fill(~there[None, :, None], -torch.inf)
        best = products.amax(3).where(real[:, None] & there.any(1)[None, :, None], 0).sum(2)
        return best / real.sum(1).clamp_min(1)[:, None] if self.mean else best

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        return {"all": row_lse(logits), "own": row_sum(logits, mask=t.own)}

    def finish(self, s: Samples) -> list[Term]:
        first, second = list(s.present)[:2]
        anchors = [first, second] if self.both else [first]
        valid = s.valid(first, second)
        return [Term(s["all", view] - s["own", view], valid, factor=1 / len(anchors)) for view in anchors]


class ColBERTConfig(LateInteractionConfig):
    pool: Literal["mean", "sum"] = Field("sum", description="over the tokens of the anchor")
    direction: Literal["both", "forward"] = Field("forward", description="forward: queries against passages alone")


@OBJECTIVES.register(
    "colbert",
    "token-wise late interaction of queries with passages (each token's best match, summed)",
    paper="ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction over BERT",
)
class ColBERT(LateInteraction):
    """`filip` with the sum over the query's tokens, in one direction."""

    Config = ColBERTConfig
