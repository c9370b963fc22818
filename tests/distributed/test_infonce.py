"""InfoNCE over real workers equals the dense formula in float64: loss, embedding gradients, temperature gradient.

The reference is CLIP's formula written out on one matrix: cross-entropy of rows and of columns, candidates with the
anchor's content or without weight taken out, mean weighted over the global batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.engine.symmetric import gaps
from cl.objectives import ObjectiveConfig, build_objective
from cl.pairs import Pairs
from tests.distributed.pool import Pool, gradient

DIMENSIONS = 6
SCALE = 14.0


@dataclass(frozen=True)
class Case:
    """A global batch and how it is divided."""

    rows: tuple[int, ...]
    exchange: str = "gather"
    direction: str = "both"
    tile_rows: int = 256
    tile_columns: int = 8192
    keep: int = 64
    repeats: bool = False
    masked: bool = False
    seed: int = 0
    temperature: float = 1 / SCALE
    dtype: torch.dtype = torch.float64
    alike: bool = False  # all embeddings the same direction, but for a little
    opposed: bool = False  # and every second anchor the other way

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        count = sum(self.rows)
        first = normalize(torch.randn(count, DIMENSIONS, generator=generator, dtype=torch.float64), dim=1)
        second = normalize(torch.randn(count, DIMENSIONS, generator=generator, dtype=torch.float64), dim=1)
        if self.alike:
            first, second = (normalize(first[:1] + 1e-3 * view, dim=1) for view in (first, second))
        if self.opposed:
            first[::2] *= -1
        content = torch.arange(2 * count).view(count, 2)
        if self.repeats:
            content = torch.randint(0, max(2, count // 2), (count, 2), generator=generator)
        weight = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
        if self.masked:
            weight[torch.rand(count, generator=generator) < 0.4] = 0
            first[weight == 0] = torch.nan  # what a masked sample holds must not matter
        return first.to(self.dtype), second.to(self.dtype), content, weight.to(self.dtype)


def reference(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients by the dense formula in one process."""
    first, second, content, weight = case.batch()
    first, second, weight = first.double().nan_to_num(), second.double(), weight.double()
    first.requires_grad_()
    second.requires_grad_()
    log_scale = torch.tensor(1 / case.temperature).log().double().requires_grad_()
    scores = log_scale.exp() * first @ second.T
    count = len(first)
    same = (content[:, None] == content[None]).any(2) & ~torch.eye(count, dtype=torch.bool)
    masked = same | (weight == 0)[None] | (weight == 0)[:, None]
    rows = scores.masked_fill(masked, -torch.inf)
    valid = weight > 0
    nothing = first.sum() * 0 + second.sum() * 0 + log_scale * 0
    if not valid.any():
        loss = nothing
    else:
        positive = scores.diagonal()[valid]
        forward = rows[valid].logsumexp(1) - positive
        backward = rows[:, valid].logsumexp(0) - positive
        share = {"both": 0.5, "forward": 1.0, "backward": 0.0}[case.direction]
        terms = share * forward + (1 - share) * backward
        loss = (weight[valid] * terms).sum() / weight.sum() + nothing
    d_first, d_second, d_scale = torch.autograd.grad(loss, (first, second, log_scale))
    return loss.detach(), d_first, d_second, d_scale


def on_worker(workers: Workers, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one worker returns; gradients as they stand before the wrapper averages them."""
    start = sum(case.rows[: workers.rank])
    mine = slice(start, start + case.rows[workers.rank])
    first, second, content, weight = (value[mine] for value in case.batch())
    first.requires_grad_()
    second.requires_grad_()
    config = ObjectiveConfig.model_validate(
        {
            "name": "infonce",
            "temperature": case.temperature,
            "direction": case.direction,
            "exchange": case.exchange,
            "tile_rows": case.tile_rows,
            "tile_columns": case.tile_columns,
            "keep": case.keep,
        }
    )
    objective = build_objective(config).to(torch.float64 if case.dtype == torch.float64 else torch.float32)
    outcome = objective(Pairs({"image": first, "text": second}, content=content, weight=weight), workers)
    outcome.loss.backward()
    scale = next(objective.parameters())
    return outcome.loss.detach(), gradient(first), gradient(second), gradient(scale)


def error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / (expected.norm() + 1e-3))


def check(pool: Pool, case: Case, bound: float = 1e-10) -> None:
    size = len(case.rows)
    expected = reference(case)
    answers = pool.run(on_worker, size, case)
    for answer in answers:
        assert error(answer[0], expected[0]) <= bound  # every worker returns the loss of the global batch
    # P on the embeddings is undone by the average over P workers; parameters are averaged themselves.
    assert error(torch.cat([answer[1] for answer in answers]) / size, expected[1]) <= bound
    assert error(torch.cat([answer[2] for answer in answers]) / size, expected[2]) <= bound
    assert error(torch.stack([answer[3] for answer in answers]).mean(), expected[3]) <= bound


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("rows", [(7,), (5, 5), (3, 8), (4, 0, 5), (0, 2, 7, 1)], ids=str)
@pytest.mark.parametrize("tiles", [(256, 8192, 64), (256, 8192, 0), (3, 4, 0), (1, 1, 64)], ids=str)
@pytest.mark.parametrize("batch", ["plain", "repeats", "masked", "repeats and masked"])
def test_equals_dense_formula(
    pool: Pool, exchange: str, rows: tuple[int, ...], tiles: tuple[int, int, int], batch: str
) -> None:
    check(
        pool,
        Case(
            rows,
            exchange,
            tile_rows=tiles[0],
            tile_columns=tiles[1],
            keep=tiles[2],
            repeats="repeats" in batch,
            masked="masked" in batch,
            seed=hash((rows, tiles)) % 1000,
        ),
    )


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_one_direction(pool: Pool, direction: str, exchange: str) -> None:
    check(pool, Case((4, 3, 5), exchange, direction, tile_rows=2, tile_columns=3, repeats=True, masked=True))


@pytest.mark.parametrize("keep", [0, 64])
@pytest.mark.parametrize("direction", ["both", "forward"])
def test_scores_far_apart(pool: Pool, direction: str, keep: int) -> None:
    """Log-sum-exps of 100 and -100 in float32: no single exponential could serve both.

    A score of 100 is rounded to 4e-6, while embeddings differ by a thousandth and the temperature's gradient is made of
    differences of scores.
    """
    case = Case((9, 6), "gather", direction, temperature=0.01, dtype=torch.float32, alike=True, opposed=True, keep=keep)
    check(pool, case, bound=5e-3)


def test_some_tiles_are_kept(pool: Pool) -> None:
    """Of 256, 256 and 178 rows of scores only the last fit into 1 MiB."""
    check(pool, Case((690,), keep=1))


def test_columns_far_below_a_row_keep_their_digits() -> None:
    """The shared exponential of a tile underflows in column 2, which is 200 below the best of its rows."""
    scores = torch.tensor([[100.0, 98.0, -101.0, -torch.inf], [90.0, -torch.inf, -103.0, -torch.inf]])
    rows, columns = gaps(scores, torch.zeros(2), torch.zeros(4))
    torch.testing.assert_close(rows.double(), scores.double().logsumexp(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(columns.double(), scores.double().logsumexp(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_scale_100_does_not_overflow(pool: Pool, exchange: str) -> None:
    """Without a running maximum the sum of exp(100) is inf in float32; ring versions of others are, from 90 on."""
    case = Case((6, 6), exchange, temperature=0.01, dtype=torch.float32, alike=True, tile_rows=4, tile_columns=4)
    for loss, first, second, scale in pool.run(on_worker, 2, case):
        assert error(loss, reference(case)[0]) < 1e-4
        assert first.isfinite().all()
        assert second.isfinite().all()
        assert scale.isfinite()


def test_zero_vectors_have_a_gradient(pool: Pool) -> None:
    """Embeddings of nothing but zeros (a dead tower): scores are 0, the loss is log N, no gradient is NaN."""
    for loss, first, second, scale in pool.run(_zero_vectors, 2):
        assert loss.item() == pytest.approx(math.log(6), rel=1e-6)
        assert not first.any()
        assert not second.any()
        assert scale == 0


def _zero_vectors(workers: Workers) -> tuple[Tensor, ...]:
    first, second = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, 4, requires_grad=True)
    objective = build_objective(ObjectiveConfig())
    loss = objective(Pairs({"image": first, "text": second}), workers).loss
    loss.backward()
    return loss.detach(), gradient(first), gradient(second), gradient(next(objective.parameters()))


def test_all_masked_is_zero(pool: Pool) -> None:
    """0/0 is 0: a step whose samples are all corrupt has no loss and no gradient."""
    for loss, first, second, scale in pool.run(_all_masked, 2):
        assert loss == 0
        assert not first.any()
        assert not second.any()
        assert scale == 0


def _all_masked(workers: Workers) -> tuple[Tensor, ...]:
    first, second = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    objective = build_objective(ObjectiveConfig())
    outcome = objective(Pairs({"image": first, "text": second}, weight=torch.zeros(3)), workers)
    outcome.loss.backward()
    return outcome.loss.detach(), gradient(first), gradient(second), gradient(next(objective.parameters()))


def test_local_negatives_are_a_weighted_mean_of_groups(pool: Pool) -> None:
    """exchange=local: L = sum over workers of (weight of worker / weight of all) x loss of worker."""
    case = Case((3, 6), "local", masked=True)
    first, second, content, weight = case.batch()
    losses = []
    for rows in (slice(0, 3), slice(3, 9)):
        objective = build_objective(ObjectiveConfig.model_validate({"temperature": case.temperature})).double()
        pairs = Pairs({"image": first[rows], "text": second[rows]}, content=content[rows], weight=weight[rows])
        losses.append(objective(pairs, Workers()).loss.detach() * weight[rows].sum() / weight.sum())
    for answer in pool.run(on_worker, 2, case):
        assert error(answer[0], sum(losses)) < 1e-12
