"""The global contrastive loss, its denominators estimated for each sample by moving averages.

    g_i    = mean_{j != i} exp(l_ij - l_ii),  l_ij = <a_i, b_j> / tau            (and from b to a)
    u_i   <- (1 - gamma) u_i + gamma g_i                                          kept for each sample and direction
    loss   = mean_i [ g_i / (eps + u_i) over both directions ] / 2                u_i without gradient

Its gradient is that of mean_i log(eps + E g_i) with the expectation over the whole corpus, not over the batch, so small
batches do not bias it. Yuan et al. 2022, "Provable Stochastic Optimization for Global Contrastive Learning: Small Batch
Does Not Harm Performance", algorithm 1; Wei et al. 2024, "FastCLIP: A Suite of Optimization Techniques to Accelerate
CLIP Training with Limited Resources", algorithm 1.

The value is about 1 at every step; the log shows `global_contrastive`, the mean of log(eps + u_i), which is what is
being minimised. Estimates are kept as logarithms, so they neither overflow nor underflow at any temperature (the
published code resets those below 1e-35). A sample's first estimate is its first g_i. Rows of one sample in the same
batch share one estimate, moved by the mean of their g_i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.rule import Reduction, Reductions, Samples, Term, Tile, column_lse, column_sum, row_lse, row_sum
from cl.memory.table import SampleTable, Visit
from cl.objectives.tiled import TiledConfig, TiledObjective
from cl.pairs import Clock, Pairs


class EstimatorConfig(TiledConfig):
    gamma: float = Field(0.2, gt=0, le=1, description="share of the new value in the moving average, at its smallest")
    gamma_schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="cosine: from 1 in the first epoch down to gamma; constant: gamma"
    )
    gamma_decay_epochs: int | None = Field(
        None, ge=1, description="epochs until gamma is reached; default: half of the run's"
    )
    epsilon: float = Field(1e-14, ge=0, description="added to the estimated mean, eps")
    same_side: bool = Field(False, description="negatives of the anchor's own view count as well (two pictures)")


class GlobalContrastive(TiledObjective):
    """See the module's formula; a subclass says what the temperature is. Needs sample ids."""

    needs: ClassVar[tuple[str, ...]] = ("ids",)
    state: ClassVar[tuple[str, ...]] = ("per-sample table",)

    def __init__(self, config: EstimatorConfig) -> None:
        super().__init__(config)
        self.config = config
        self.table = SampleTable({f"{name}.{view}": value for name, value in self.kept().items() for view in range(2)})
        self.log_epsilon = math.log(config.epsilon) if config.epsilon else -math.inf
        self.compared: list[str] = []  # the two views of the present batch
        self._visit: Visit | None = None
        self._estimate = torch.zeros(())

    def kept(self) -> Mapping[str, float]:
        """What the table keeps of each sample and view, and its value before the first visit."""
        return {"log_u": -math.inf}

    def logits(self, t: Tile) -> tuple[Tensor, Tensor]:
        """The tile's scores over the temperatures of the rows, and over those of the columns."""
        raise TypeError(f"{type(self).__name__} must define logits(t).")

    def positive(self, s: Samples, view: str) -> Tensor:
        """[B]: the score of the own pair over the temperature of the anchor in `view`."""
        raise TypeError(f"{type(self).__name__} must define positive(s, view).")

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        first, second = views[:2]
        across = [(first, second)]
        return [*across, (first, first), (second, second)] if self.config.same_side else across

    def gamma(self, clock: Clock) -> float:
        """Wei et al. 2024, section 5.1: a cosine by epoch; 1, the batch alone, in the first."""
        least = self.config.gamma
        decay = self.config.gamma_decay_epochs or max(clock.epochs // 2, 1)
        if self.config.gamma_schedule == "constant" or clock.epoch >= decay:
            return least
        return (1 + math.cos(math.pi * clock.epoch / decay)) / 2 * (1 - least) + least

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        self.compared = list(self.view_names or pairs.views)[:2]
        self._visit = self.table.visit(pairs.ids, pairs.weights(), workers)
        outcome = super().forward(replace(pairs, labels={**pairs.labels, **self._visit.values}), workers)
        self._visit = None
        return outcome

    def tile(self, t: Tile) -> Reductions:
        rows, columns = self.logits(t)
        ones = torch.ones_like(t.scores)
        found = {"rest": self.both(t, row_lse(rows, "negatives"), column_lse(columns, "negatives"))}
        return {**found, "count": self.both(t, row_sum(ones, "negatives"), column_sum(ones, "negatives"))}

    @staticmethod
    def both(t: Tile, rows: Reduction, columns: Reduction) -> list[Reduction]:
        """Within one view every pair is met from both sides already."""
        return [rows] if t.row_view == t.column_view else [rows, columns]

    def log_g(self, s: Samples, view: str) -> Tensor:
        """[B], -inf for a sample without negatives."""
        return s["rest", view] - self.positive(s, view) - s["count", view].clamp_min(1).log()

    def prepare(self, s: Samples) -> Mapping[str, Tensor]:
        """Move what is kept of the samples; gives its values as they are now, and on which samples they are."""
        visit = self._visit
        assert visit is not None
        gamma = self.gamma(s.clock)
        log_g = [self.log_g(s, view) for view in self.compared]
        valid = s.valid() & log_g[0].isfinite() & log_g[1].isfinite()
        new: dict[str, Tensor] = {}
        for number in range(2):
            old = s.meta[f"log_u.{number}"]
            now = visit.log_mean(log_g[number], valid)
            kept = old + math.log1p(-gamma) if gamma < 1 else torch.full_like(old, -math.inf)
            new[f"log_u.{number}"] = torch.where(old == -math.inf, now, torch.logaddexp(kept, now + math.log(gamma)))
        new |= self.move(s, new, valid, visit)
        visit.write(new, valid)
        weight = (s.meta["weight"] * valid).to(log_g[0].dtype)
        sums = torch.stack([(weight * self.log_mean_u(new, number)).sum() / 2 for number in range(2)] + [weight.sum()])
        visit.workers.all_reduce(sums)
        self._estimate = (sums[0] + sums[1]) / sums[2].clamp_min(1e-30)
        return {**new, "valid": valid}

    def move(self, s: Samples, new: Mapping[str, Tensor], valid: Tensor, visit: Visit) -> Mapping[str, Tensor]:
        """New values of the other fields, given the new log_u."""
        return {}

    def log_mean_u(self, values: Mapping[str, Tensor], number: int) -> Tensor:
        """[B]: log(eps + u)."""
        log_u = values[f"log_u.{number}"]
        return torch.logaddexp(log_u, torch.full_like(log_u, self.log_epsilon))

    def finish(self, s: Samples) -> list[Term]:
        ratios = [self.log_g(s, view) - self.log_mean_u(s.prepared, n) for n, view in enumerate(self.compared)]
        return [Term(ratio.exp(), s.prepared["valid"], 0.5) for ratio in ratios]

    def measures(self) -> Mapping[str, Tensor]:
        return {**super().measures(), "global_contrastive": self._estimate}
