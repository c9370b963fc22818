"""Any rule over real workers equals the dense formula by plain autograd in float64.

The rules here are made to use every part of the contract once: both axes, comparisons within a view, sums, tilted
means, top-k, per-sample inputs, two passes with gradients through the first, terms with their own denominators, and a
function of global means. Each has its dense formula beside it, written without the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize

from cl.engine.collectives import Workers
from cl.engine.rule import (
    Reductions,
    Rule,
    Samples,
    Term,
    Tile,
    Tiler,
    column_lse,
    column_mean,
    column_sum,
    row_lse,
    row_mean,
    row_sum,
    row_top,
)
from cl.engine.side import sides_of
from cl.engine.sweep import Exchange, Tiling
from cl.engine.tiles import evaluate
from tests.distributed.pool import Pool, gradient


class _Scaled(Rule):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0, dtype=torch.float64))

    def dense(self, a: Tensor, b: Tensor, weight: Tensor, same: Tensor) -> Tensor:
        """The loss from whole matrices; `same` [N, N] marks equal content, own pair included."""
        raise AssertionError


def mean(values: Tensor, weight: Tensor) -> Tensor:
    return (weight * values.where(weight > 0, 0)).sum() / weight.sum()


class Clip(_Scaled):
    def tile(self, t: Tile) -> Reductions:
        logits = self.scale * t.scores
        return {"lse": [row_lse(logits), column_lse(logits)]}

    def finish(self, s: Samples) -> Tensor:
        return (s["lse", "a"] + s["lse", "b"]) / 2 - self.scale * s.own("a", "b")

    def dense(self, a: Tensor, b: Tensor, weight: Tensor, same: Tensor) -> Tensor:
        logits = self.scale * a @ b.T
        out = same & ~torch.eye(len(a), dtype=torch.bool) | (weight == 0)[None] | (weight == 0)[:, None]
        masked = logits.masked_fill(out, -torch.inf)
        return mean((masked.logsumexp(1) + masked.logsumexp(0)) / 2 - logits.diagonal(), weight)


class NTXent(_Scaled):
    """Both views are anchors; candidates are the other samples' both views and the own other view."""

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [("a", "b"), ("a", "a"), ("b", "b")]

    def tile(self, t: Tile) -> Reductions:
        logits = self.scale * t.scores
        if t.row_view == t.column_view:
            return {"lse": row_lse(logits)}
        return {"lse": [row_lse(logits), column_lse(logits)]}

    def finish(self, s: Samples) -> Tensor:
        return s["lse", "a"] + s["lse", "b"] - 2 * self.scale * s.own("a", "b")

    def dense(self, a: Tensor, b: Tensor, weight: Tensor, same: Tensor) -> Tensor:
        n = len(a)
        both = torch.cat([a, b])
        logits = self.scale * both @ both.T
        own = torch.eye(2 * n, dtype=torch.bool)
        positive = own.roll(n, 1)
        w = torch.cat([weight, weight])
        out = same.repeat(2, 2) & ~positive | own | (w == 0)[None] | (w == 0)[:, None]
        lse = logits.masked_fill(out, -torch.inf).logsumexp(1)
        terms = lse - logits[positive]
        return mean(terms[:n] + terms[n:], weight)


class SigLIP(_Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def tile(self, t: Tile) -> Reductions:
        sign = torch.where(t.own, 1.0, -1.0)
        return {"loss": row_sum(-logsigmoid(sign * (self.scale * t.scores + self.bias)))}

    def finish(self, s: Samples) -> Tensor:
        return s["loss"]

    def dense(self, a: Tensor, b: Tensor, weight: Tensor, same: Tensor) -> Tensor:
        own = torch.eye(len(a), dtype=torch.bool)
        entries = -logsigmoid(torch.where(own, 1.0, -1.0) * (self.scale * a @ b.T + self.bias))
        out = same & ~own | (weight == 0)[None] | (weight == 0)[:, None]
        return mean(entries.masked_fill(out, 0).sum(1), weight)


class TwoPasses(_Scaled):
    """Pass 2 reads the log-sum-exps of pass 1 from both sides, and gradients flow through both."""

    def passes(self) -> Sequence[Tiler]:
        return [self.first, self.second]

    def first(self, t: Tile) -> Reductions:
        logits = self.scale * t.scores
        return {"lse": [row_lse(logits), column_lse(logits)]}

    def second(self, t: Tile) -> Reductions:
        logits = self.scale * t.scores
        gap = (logits - t.row("lse")).exp() - (logits - t.column("lse")).exp()
        return {"gap": [row_sum(gap**2, over="negatives"), column_sum(gap**3, over="negatives")]}

    def finish(self, s: Samples) -> Tensor:
        return s["gap", "a"] + 2 * s["gap", "b"] + 0.1 * s["lse", "a"]

    def dense(self, a: Tensor, b: Tensor, weight: Tensor, same: Tensor) -> Tensor:
        own = torch.eye(len(a), dtype=torch.bool)
        invalid = (weight == 0)[None] | (weight == 0)[:, None]
        logits = self.scale * a @ b.T
        masked = logits.masked_fill(same & ~own | invalid, -torch.inf)
        rows, columns = masked.logsumexp(1), masked.logsumexp(0)
        good = weight > 0
        rows, columns = rows.where(good, 0), columns.where(good, 0)
        gap = (logits - rows[:, None]).exp() - (logits - columns[None]).exp()
        gap = gap.masked_fill(same | own | invalid, 0)
        return mean((gap**2).sum(1) + 2 * (gap**3).sum(0) + 0.1 * rows, weight)


class Stopped(TwoPasses):
    """As before, but the first pass's statistics are constants in the second (its own use of them is not)."""

    stopped = frozenset({"lse"})

    def finish(self, s: Samples) -> Tensor:
        return s["gap", "a"]

    def dense(self, a: Tensor, b: Tensor, weight: Tensor, same: Tensor) -> Tensor:
        own = torch.eye(len(a), dtype=torch.bool)
        invalid = (weight == 0)[None] | (weight == 0)[:, None]
        logits = self.scale * a @ b.T
        masked = logits.masked_fill(same & ~own | invalid, -torch.inf).detach()
        rows, columns = masked.logsumexp(1), masked.logsumexp(0)
        gap = (logits - rows.where(weight > 0, 0)[:, None]).exp() - (logits - columns.where(weight > 0, 0)).exp()
        return mean((gap**2).masked_fill(same | own | invalid, 0).sum(1), weight)


class PerSample(_Scaled):
    """A temperature for each sample, computed from its own embedding, used on rows and columns; tilted means; top 2."""

    def __init__(self) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))

    def inputs(self, s: Samples) -> Mapping[tuple[str, str], Tensor]:
        return {(("tau"), view): 0.5 + (s.views[view] @ self.direction).sigmoid() for view in ("a", "b")}

    def tile(self, t: Tile) -> Reductions:
        by_row, by_column = t.scores / t.row("tau"), t.scores / t.column("tau")
        return {
            "mean": [
                row_mean(self.scale * by_row, by_row**2, over="negatives"),
                column_mean(self.scale * by_column, by_column**2, over="negatives"),
            ],
            "top": row_top(by_row * by_column, k=2),
        }

    def finish(self, s: Samples) -> Sequence[Term]:
        top = s["top"]
        return [
            Term(s["mean", "a"] - s["mean", "b"] + s["tau", "a"]),
            Term(top.where(top.isfinite(), 0).sum(1), valid=s.own("a", "b") > 0, factor=0.5),
        ]

    def dense(self, a: Tensor, b: Tensor, weight: Tensor, same: Tensor) -> Tensor:
        own = torch.eye(len(a), dtype=torch.bool)
        out = same | own | (weight == 0)[None] | (weight == 0)[:, None]
        tau_a, tau_b = (0.5 + (x @ self.direction).sigmoid() for x in (a, b))
        scores = a @ b.T
        by_row, by_column = scores / tau_a[:, None], scores / tau_b[None]

        def tilted(logits: Tensor, payload: Tensor, dim: int) -> Tensor:
            chance = (self.scale * logits).masked_fill(out, -torch.inf).softmax(dim).nan_to_num(0)
            return (chance * payload).sum(dim)

        first = tilted(by_row, by_row**2, 1) - tilted(by_column, by_column**2, 0) + tau_a
        top = (by_row * by_column).masked_fill(out, -torch.inf).topk(2, dim=1).values
        second = top.where(top.isfinite(), 0).sum(1)
        valid = weight * ((a * b).sum(1) > 0)
        return mean(first, weight) + 0.5 * mean(second, valid)


class Uniformity(_Scaled):
    """log of a global mean (Wang and Isola 2020): a function of the means, not a mean of functions."""

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [("a", "a")]

    def tile(self, t: Tile) -> Reductions:
        return {
            "potential": row_sum((2 * self.scale * (t.scores - 1)).exp(), over="all"),
            "count": row_sum(torch.ones_like(t.scores), over="all"),
        }

    def finish(self, s: Samples) -> Tensor:
        return s["potential"] / s["count"].clamp_min(1)

    def combine(self, means: Tensor) -> Tensor:
        return means.sum().log()

    def dense(self, a: Tensor, b: Tensor, weight: Tensor, same: Tensor) -> Tensor:
        out = torch.eye(len(a), dtype=torch.bool) | (weight == 0)[None] | (weight == 0)[:, None]
        potential = (2 * self.scale * (a @ a.T - 1)).exp().masked_fill(out, 0).sum(1)
        return mean(potential / (~out).sum(1).clamp_min(1), weight).log()


RULES = {rule.__name__: rule for rule in (Clip, NTXent, SigLIP, TwoPasses, Stopped, PerSample, Uniformity)}


@dataclass(frozen=True)
class Case:
    rule: str
    rows: tuple[int, ...]
    exchange: Exchange
    tiling: Tiling
    hard: bool  # repeated content and masked samples

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(sum(self.rows))
        count = sum(self.rows)
        a, b = (normalize(torch.randn(count, 6, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
        weight = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
        content = torch.arange(count)[:, None]
        if self.hard:
            content = torch.randint(0, max(2, count - 3), (count, 1), generator=generator)
            weight[1::4] = 0
        return a, b, weight, content


def on_worker(workers: Workers, case: Case) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    start = sum(case.rows[: workers.rank])
    mine = slice(start, start + case.rows[workers.rank])
    a, b, weight, content = (value[mine] for value in case.batch())
    a.requires_grad_()
    b.requires_grad_()
    rule = RULES[case.rule]()
    layout = workers.layout(len(a), a.device)
    sides = sides_of({"a": a, "b": b}, layout, weight, content=content)
    loss, _ = evaluate(rule, sides, workers, case.exchange, case.tiling)
    loss.backward()
    return loss.detach(), gradient(a), gradient(b), [gradient(parameter) for parameter in rule.parameters()]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("rows", [(9,), (4, 7), (5, 0, 6), (3, 2, 0, 6)], ids=str)
@pytest.mark.parametrize("tiling", [Tiling(), Tiling(2, 3)], ids=["one tile", "2 x 3"])
@pytest.mark.parametrize("hard", [False, True], ids=["plain", "hard"])
def test_rule_equals_dense_formula(
    pool: Pool, name: str, exchange: Exchange, rows: tuple[int, ...], tiling: Tiling, hard: bool
) -> None:
    case = Case(name, rows, exchange, tiling, hard)
    a, b, weight, content = case.batch()
    a.requires_grad_()
    b.requires_grad_()
    rule = RULES[name]()
    loss = rule.dense(a, b, weight, content == content.T)
    expected = torch.autograd.grad(loss, [a, b, *rule.parameters()], materialize_grads=True, allow_unused=True)
    answers = pool.run(on_worker, len(rows), case)
    size = len(rows)
    for answer in answers:
        assert_close(answer[0], loss.detach())
    assert_close(torch.cat([answer[1] for answer in answers]) / size, expected[0])
    assert_close(torch.cat([answer[2] for answer in answers]) / size, expected[1])
    for number, slope in enumerate(expected[2:]):
        assert_close(torch.stack([answer[3][number] for answer in answers]).mean(0), slope)


def assert_close(value: Tensor, expected: Tensor) -> None:
    assert float((value - expected).norm() / (expected.norm() + 1e-3)) < 1e-10
