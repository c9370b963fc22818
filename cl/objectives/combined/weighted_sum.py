"""A weighted sum of objectives, or another combination of their gradients.

    L = sum_k w_k(step) L_k

With `gradients: sum` the gradient is that of L. Otherwise the gradients g_k of w_k L_k with respect to the embeddings
of the *global* batch are combined by their inner products, which are summed over all workers, so that the direction is
the same for any number of them. The shared representation stands for the shared parameters, as in MGDA-UB (Sener and
Koltun 2018, "Multi-Task Learning as Multi-Objective Optimization", section 3.3). The parameters of each objective
(temperatures) keep their own gradient; the value that is reported is L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from cl.config import Config
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.objectives.base import OBJECTIVES, Objective, ObjectiveConfig, build_objective
from cl.objectives.combined.conflicts import Rule, coefficients
from cl.objectives.schedule import Scheduled, value_at
from cl.pairs import Pairs


class TermConfig(Config):
    objective: ObjectiveConfig = Field(description="a registered objective and its fields")
    weight: Scheduled = Field(1.0, description="a number, or a ramp over the run; at 0 the term is not computed")


class WeightedSumConfig(Config):
    terms: dict[str, TermConfig] = Field(description="name -> objective and weight")
    gradients: Rule = Field(
        "sum",
        description="sum; mgda: a direction that harms no term; project: drop what conflicts; normalise: equal lengths",
    )

    @field_validator("terms")
    @classmethod
    def _some(cls, terms: dict[str, TermConfig]) -> dict[str, TermConfig]:
        if not terms:
            raise ValueError("name at least one term")
        return terms


@OBJECTIVES.register(
    "sum",
    "a weighted sum of objectives with scheduled weights, or a combination of their gradients (MGDA, projection)",
    paper="Multi-Task Learning as Multi-Objective Optimization",
)
class WeightedSum(Objective):
    """See the module's formula."""

    Config = WeightedSumConfig
    compares = "what its terms compare"
    needs = ("what its terms need",)
    state = ("that of its terms",)
    memory = "that of its terms"

    def __init__(self, config: WeightedSumConfig, terms: Sequence[Objective]) -> None:
        super().__init__()
        self.rule = config.gradients
        self.weights = {name: term.weight for name, term in config.terms.items()}
        self.terms = nn.ModuleDict(dict(zip(config.terms, terms, strict=True)))

    @classmethod
    def build(cls, config: Any, dimensions: int | None) -> WeightedSum:
        return cls(config, [build_objective(term.objective, dimensions) for term in config.terms.values()])

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        weights = {name: value_at(weight, pairs.clock) for name, weight in self.weights.items()}
        active = [name for name, weight in weights.items() if weight != 0]
        metrics: dict[str, Tensor] = {}
        leaves, inside = (_embeddings(pairs), pairs) if self.rule == "sum" else _cut_off(pairs)
        losses = []
        for name in active:
            outcome = self.terms[name](inside, workers)
            metrics |= {f"{name}/{key}": value for key, value in outcome.metrics.items()}
            metrics[f"{name}/loss"] = outcome.loss.detach()
            losses.append(weights[name] * outcome.loss)
        if not losses:
            return Outcome(pairs.weights().sum() * 0, metrics)
        total = torch.stack(losses).sum()
        if self.rule == "sum" or not torch.is_grad_enabled():
            return Outcome(total, metrics)
        alpha, combined, parameters, slopes = self._directions(losses, leaves, workers, pairs.clock.step)
        metrics |= {f"{name}/share": share for name, share in zip(active, alpha, strict=True)}
        trained = [value for value in _embeddings(pairs) if value.requires_grad]
        return Outcome(_Given.apply(total.detach(), *combined, *slopes, *trained, *parameters), metrics)

    def _directions(
        self, losses: Sequence[Tensor], leaves: Sequence[Tensor], workers: Workers, step: int
    ) -> tuple[Tensor, list[Tensor], list[nn.Parameter], list[Tensor]]:
        """The share [K] of each term, the combined gradient of each leaf, the parameters and their gradients."""
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        found = [
            torch.autograd.grad(loss, [*wanted, *parameters], allow_unused=True, materialize_grads=True)
            for loss in losses
        ]
        ours = [[grad.double() for grad in grads[: len(wanted)]] for grads in found]
        products = [[sum((x * y).sum() for x, y in zip(a, b, strict=True)) for b in ours] for a in ours]
        gram = torch.stack([torch.stack([torch.as_tensor(p, dtype=torch.float64) for p in row]) for row in products])
        gram = workers.all_reduce(gram.to(losses[0].device)) / workers.averaged_by**2
        alpha = coefficients(self.rule, gram, step)
        combined = [
            torch.stack([a.to(grads[n]) * grads[n] for a, grads in zip(alpha, found, strict=True)]).sum(0)
            for n in range(len(wanted))
        ]
        slopes = [torch.stack([grads[len(wanted) + n] for grads in found]).sum(0) for n in range(len(parameters))]
        return alpha, combined, parameters, slopes

    def clamp_(self) -> None:
        for term in self.terms.values():
            term.clamp_()  # type: ignore[operator]


def _embeddings(pairs: Pairs) -> list[Tensor]:
    """Everything in the batch that may receive a gradient, in order."""
    return [*pairs.views.values(), *(extra.embeddings for extra in pairs.extra.values())]


def _cut_off(pairs: Pairs) -> tuple[list[Tensor], Pairs]:
    """The same batch on embeddings that are leaves."""

    def leaf(value: Tensor) -> Tensor:
        return value.detach().requires_grad_(value.requires_grad)

    views = {name: leaf(value) for name, value in pairs.views.items()}
    extra = {name: replace(each, embeddings=leaf(each.embeddings)) for name, each in pairs.extra.items()}
    inside = replace(pairs, views=views, extra=extra)
    return _embeddings(inside), inside


class _Given(torch.autograd.Function):
    """A value whose gradients are known: of (value, n slopes, n inputs), the inputs get the slopes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        half = len(tensors) // 2
        ctx.save_for_backward(*tensors[:half])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slopes = ctx.saved_tensors
        return None, *([None] * len(slopes)), *(slope * grad.to(slope) for slope in slopes)
