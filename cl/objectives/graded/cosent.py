"""CoSENT and AnglE: of two scored pairs, the one with the higher label shall have the higher score.

    loss = log( 1 + sum over i, k with y_i > y_k of v_i exp((s_k - s_i) / tau) ),   s_i = score of the pair (a_i, b_i)

CoSENT: Huang et al. 2024, "CoSENT: Consistent Sentence Embedding via Similarity Ranking", s the cosine. AnglE: Li and
Li 2024, "AnglE-optimized Text Embeddings": each embedding is a complex vector (first half real, second half imaginary),
and s = |Re q + Im q| of q = <a_i, b_i> / (|a_i| |b_i|), as in the authors' code; its loss is added to that of the
cosines (the paper's third term, in-batch negatives, is `infonce` in a sum). Pairs i, k run over the samples of all
workers; v_i is the sample's weight over the mean weight. Scores are one number a sample: all are gathered and sorted by
label, and a running sum over those with lower labels takes the place of comparing all with all.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from cl.engine.collectives import Workers, gather_rows
from cl.engine.moments import replicated
from cl.objectives.base import OBJECTIVES, Objective, Outcome
from cl.objectives.schedule import Scheduled
from cl.objectives.temperature import Temperature, TemperatureConfig
from cl.pairs import Pairs


class CoSENTConfig(TemperatureConfig):
    temperature: Scheduled = Field(0.05, description="differences of scores are divided by it")
    learn_temperature: bool = Field(False, description="train the log of the inverse temperature")
    views: list[str] | None = Field(None, description="the two sides of a pair; default: the batch's first two views")
    label: str = Field("score", description="label [B]: how alike the two sides of each pair are")


@OBJECTIVES.register(
    "cosent",
    "pairs with higher labels get higher cosines: a smooth maximum over all inversions",
    paper="CoSENT: Consistent Sentence Embedding via Similarity Ranking",
)
class CoSENT(Objective):
    """See the module's formula. Parameters: the log of the inverse temperature, if it is trained."""

    Config = CoSENTConfig
    needs = ("scored pairs",)

    def __init__(self, config: CoSENTConfig) -> None:
        super().__init__()
        self.views, self.label = config.views, config.label
        self.temperature = Temperature(config)
        self.shares: tuple[float, ...] = (1.0,)

    def scores(self, first: Tensor, second: Tensor) -> list[Tensor]:
        """[B] each: what is compared of pairs of embeddings [B, D], for each of `shares`."""
        return [(first * second).sum(1)]

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        names = list(self.views or pairs.views)[:2]
        weight = torch.stack([pairs.view_weights(name) for name in names]).amin(0)
        first, second = (pairs.view(name).to(pairs.dtype).where(weight[:, None] > 0, 0) for name in names)
        layout = workers.layout(len(pairs), pairs.device)
        weights, labels = layout.gather(weight), layout.gather(pairs.label(self.label))
        counts = weights > 0
        self.temperature.follow_(pairs.clock)
        scale = self.temperature()
        loss = torch.zeros((), dtype=pairs.dtype, device=pairs.device)
        for share, score in zip(self.shares, self.scores(first, second), strict=True):
            scores = scale * gather_rows(score, layout)[counts]
            loss = loss + share * inversions(scores, labels[counts], weights[counts])
        return Outcome(replicated(loss, workers), {"logit_scale": scale.detach()})

    def clamp_(self) -> None:
        self.temperature.clamp_()


def inversions(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """log(1 + sum_i v_i sum over k with a lower label of exp(s_k - s_i)), of [N] each."""
    order = labels.argsort(stable=True)
    scores, labels, weights = scores[order], labels[order], weights[order]
    lower = torch.searchsorted(labels, labels)  # how many labels are lower than this one
    below = scores.logcumsumexp(0)[(lower - 1).clamp_min(0)]
    terms = below - scores + (weights / weights.mean()).log()
    # The zero is the 1 of the formula; it also keeps the graph, and its collectives, where nothing is inverted.
    return torch.cat([0 * scores.sum()[None], terms[lower > 0]]).logsumexp(0)


class AnglEConfig(CoSENTConfig):
    cosine_weight: float = Field(1.0, ge=0, description="weight of the loss on cosines")
    angle_weight: float = Field(1.0, ge=0, description="weight of the loss on angles")


@OBJECTIVES.register(
    "angle",
    "CoSENT on cosines and on the difference of angles of complex embeddings",
    paper="AnglE-optimized Text Embeddings",
)
class AnglE(CoSENT):
    """See the module's formula. Parameters: the log of the inverse temperature, if it is trained."""

    Config = AnglEConfig

    def __init__(self, config: AnglEConfig) -> None:
        super().__init__(config)
        self.shares = (config.cosine_weight, config.angle_weight)

    def scores(self, first: Tensor, second: Tensor) -> list[Tensor]:
        (a, b), (c, d) = (pad(x, (0, x.shape[1] % 2)).chunk(2, dim=1) for x in (first, second))
        angle = ((a * c + b * d).sum(1) + (b * c - a * d).sum(1)).abs()
        return [*super().scores(first, second), angle]
