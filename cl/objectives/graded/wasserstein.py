"""List-wise Wasserstein distances between scores and relevances.

    P_ij = softmax_j(<a_i, c_j> / tau),   Q_ij = softmax_j(y_ij / target_temperature)

    wasserstein            loss_i = integral |F_i(y) - G_i(y)| dy       F_i and G_i the distribution functions of y_ij
                                                                        where j has the chances P_ij and Q_ij
    wasserstein-gaussian   L = |m_P - m_Q|^2 + tr(S_P) + tr(S_Q) - 2 tr( (S_P S_Q)^(1/2) )

The first is, list by list, the least relevance that must be carried, and how far, to turn P_i into Q_i: the optimal
transport of Yu et al. 2019, "WassRank: Listwise Document Ranking Using Optimal Transport Theory", with the difference
of relevances for its cost. The second is the squared 2-Wasserstein distance between the Gaussians that have the mean m
and the covariance S of the rows of the global batch: Esfandiarpoor et al. 2025, "Beyond Contrastive Learning: Synthetic
Data Enables List-wise Training with Multiple Levels of Relevance". It is the same whichever list is whose anchor's, so
it is for models that rank already; the last trace is the nuclear norm of X Y^T, where S_P = X^T X and S_Q = Y^T Y, so
that only a matrix of anchors x anchors is decomposed, at the cost of the cube of the global batch.

y [B, N] is `pairs.targets[target]`, the relevance of every sample of the global batch to each of this worker's (grades
such as 0 to 3); candidates of equal content, and those of relevance -inf, have no part in either distribution.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from cl.engine import moments
from cl.engine.collectives import Layout, Workers, gather_rows
from cl.engine.outcome import Outcome
from cl.errors import DataError
from cl.objectives.base import OBJECTIVES, Objective
from cl.objectives.temperature import Temperature, TemperatureConfig
from cl.pairs import Pairs


class WassersteinConfig(TemperatureConfig):
    views: tuple[str, str] | None = Field(None, description="the two views to compare; default: the batch's two views")
    target: str = Field("soft", description="name of the relevances in the batch's targets")
    target_temperature: float = Field(1.0, gt=0, description="relevances are divided by it")


class Lists(Objective):
    """Distributions over whole lists; a subclass says how far they are apart."""

    Config = WassersteinConfig
    needs = ("targets",)
    memory = "batch^2 / workers"

    def __init__(self, config: WassersteinConfig) -> None:
        super().__init__()
        self.config = config
        self.temperature = Temperature(config)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        self.temperature.follow_(pairs.clock)
        first, second = pairs.two_views(self.config.views)
        weight = pairs.view_weights(first).where(pairs.view_weights(second) > 0, 0)
        layout = workers.layout(len(pairs), pairs.device)
        counts = self.counts(pairs, weight, layout)
        alive = (weight > 0)[:, None]
        anchors, candidates = (pairs.view(name).to(pairs.dtype).where(alive, 0) for name in (first, second))
        scores = self.temperature() * anchors @ gather_rows(candidates, layout).T
        given = distribution(scores, counts)
        wanted = distribution(self.relevance(pairs, layout) / self.config.target_temperature, counts)
        relevance = self.relevance(pairs, layout).where(counts, 0)
        distance = self.distance(given, wanted, relevance, weight, layout)
        return Outcome(moments.replicated(distance, workers), dict(self.measures()))

    def distance(self, given: Tensor, wanted: Tensor, relevance: Tensor, weight: Tensor, layout: Layout) -> Tensor:
        """The loss, the same on every worker, from P, Q and y [B, N] of this worker; all 0 where nothing counts."""
        raise TypeError(f"{type(self).__name__} must define distance(...).")

    def counts(self, pairs: Pairs, weight: Tensor, layout: Layout) -> Tensor:
        """[B, N] bool: the candidates of each of this worker's anchors."""
        counts = (weight > 0)[:, None] & (layout.gather(weight) > 0)
        content = pairs.content_columns()
        if content is not None:
            place = torch.arange(layout.total, device=counts.device)
            own = place[layout.local, None] == place
            counts &= own | ~(content[:, None] == layout.gather(content)).any(-1)
        return counts & self.relevance(pairs, layout).isfinite()

    def relevance(self, pairs: Pairs, layout: Layout) -> Tensor:
        """y [B, N].

        Raises:
            DataError: the batch does not have it, or not for all samples of the global batch.
        """
        known = pairs.targets.get(self.config.target)
        if known is None or known.shape[1] != layout.total:
            have = {name: list(value.shape) for name, value in pairs.targets.items()}
            raise DataError(
                f"The objective needs the targets {self.config.target!r} [{len(pairs)}, {layout.total}], but the "
                f"batch's are: {have or 'none'}."
            )
        return known.to(pairs.dtype)

    def measures(self) -> Mapping[str, Tensor]:
        return {"logit_scale": self.temperature().detach()}

    def clamp_(self) -> None:
        self.temperature.clamp_()


@OBJECTIVES.register(
    "wasserstein",
    "how much relevance must be carried, and how far, to make the scores of a list its relevances (WassRank)",
    paper="WassRank: Listwise Document Ranking Using Optimal Transport Theory",
)
class Wasserstein(Lists):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    def distance(self, given: Tensor, wanted: Tensor, relevance: Tensor, weight: Tensor, layout: Layout) -> Tensor:
        ranked, order = relevance.sort(1)
        ahead = (given - wanted).gather(1, order).cumsum(1)[:, :-1]  # F - G between each relevance and the next
        carried = (ahead.abs() * ranked.diff(dim=1)).sum(1)
        return moments.mean(carried[:, None], weight, layout.workers)[0]


@OBJECTIVES.register(
    "wasserstein-gaussian",
    "2-Wasserstein distance between Gaussians of the scores and of the relevances of all lists (SyCL)",
    paper="Beyond Contrastive Learning: Synthetic Data Enables List-wise Training with Multiple Levels of Relevance",
)
class WassersteinGaussian(Lists):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    memory = "batch^2"

    def distance(self, given: Tensor, wanted: Tensor, relevance: Tensor, weight: Tensor, layout: Layout) -> Tensor:
        workers = layout.workers
        total = workers.all_reduce(weight.sum())
        centres = [moments.mean(rows, weight, workers) for rows in (given, wanted)]
        # Rows scaled so that the rows of all workers together are a root of the covariance.
        share = (weight / total.where(total > 0, 1)).sqrt()[:, None]
        given, wanted = (share * (rows - mean) for rows, mean in zip((given, wanted), centres, strict=True))
        traces = moments.total(given.square().sum() + wanted.square().sum(), workers)
        overlap = gather_rows(given, layout) @ layout.gather(wanted).T
        return (centres[0] - centres[1]).square().sum() + traces - 2 * nuclear_norm(overlap)


def distribution(logits: Tensor, counts: Tensor) -> Tensor:
    """softmax over the entries that count [B, N]; rows without any are zeros."""
    some = counts.any(1, keepdim=True)
    return logits.masked_fill(~counts & some, -torch.inf).where(some, 0).softmax(1).where(counts, 0)


def nuclear_norm(matrix: Tensor) -> Tensor:
    """The sum of the singular values; its slope is that of the part of the matrix that is not zero to rounding."""
    with torch.no_grad():
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = values > values.max() * len(matrix) * torch.finfo(matrix.dtype).eps
        slope = (left * kept) @ right
    return (slope * matrix).sum()
