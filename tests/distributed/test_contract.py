"""The rest of the rule contract over real workers: what `test_tiles.py` does not use of it, each beside its formula.

Mined negatives with owners, constant columns with statistics of their own, a teacher's scores beside the student's, a
comparison's own score on tokens, top-k by column and over several views, random numbers, targets, missing views, and
sub-groups that share candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize

from cl.engine import randomness
from cl.engine.collectives import Workers
from cl.engine.exchange import Exchanger
from cl.engine.rule import (
    Comparison,
    Known,
    Reductions,
    Rule,
    Samples,
    Term,
    Tile,
    Tiler,
    column_lse,
    column_sum,
    column_top,
    row_lse,
    row_sum,
    row_top,
)
from cl.engine.side import Side, sides_of
from cl.engine.sweep import Exchange, Tiling
from cl.engine.tiles import evaluate
from cl.pairs import Clock
from tests.distributed.pool import Pool

WIDTH, SCALE, PROTOTYPES = 6, 9.0, 4


@dataclass(frozen=True)
class Whole:
    """A global batch of N samples, with everything that any of the rules here asks for."""

    a: Tensor
    b: Tensor
    teacher_a: Tensor
    teacher_b: Tensor
    tokens_a: Tensor  # [N, 3, D]
    tokens_b: Tensor
    token_mask: Tensor  # [N, 3]
    mined: Tensor  # [M, D]
    owner: Tensor  # [M]
    prototypes: Tensor  # [K, D]
    weight: Tensor
    content: Tensor  # [N]
    mined_content: Tensor
    present_b: Tensor
    targets: Tensor  # [N, N]
    keys: Tensor

    @property
    def own(self) -> Tensor:
        return torch.eye(len(self.weight), dtype=torch.bool)

    @property
    def excluded(self) -> Tensor:
        masked = self.weight == 0
        return (self.content[:, None] == self.content) & ~self.own | masked[None] | masked[:, None]

    def mean(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        weight = self.weight if valid is None else self.weight * valid
        return (weight * values.where(weight > 0, 0)).sum() / weight.sum().clamp_min(1e-30)


def whole(rows: Sequence[int], hard: bool) -> Whole:
    generator = torch.Generator().manual_seed(sum(rows))
    count = sum(rows)

    def points(*shape: int) -> Tensor:
        return normalize(torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64), dim=-1)

    owner = torch.arange(count).repeat_interleave(torch.randint(0, 3, (count,), generator=generator))
    content = torch.arange(count)
    weight = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
    present = torch.ones(count, dtype=torch.bool)
    mined_content = 1000 + torch.arange(len(owner))
    if hard:
        content = torch.randint(0, max(2, count - 3), (count,), generator=generator)
        weight[1::4] = 0
        present = torch.rand(count, generator=generator) < 0.7
        mined_content[::3] = content[owner[::3]]  # mined by mistake: their owner's own content
    lengths = torch.randint(1, 4, (count,), generator=generator)
    return Whole(
        points(count),
        points(count),
        points(count),
        points(count),
        points(count, 3),
        points(count, 3),
        torch.arange(3) < lengths[:, None],
        points(len(owner)),
        owner,
        points(PROTOTYPES),
        weight,
        content,
        mined_content,
        present,
        torch.rand(count, count, generator=generator, dtype=torch.float64),
        torch.randint(0, 1 << 60, (count,), generator=generator),
    )


class _Rule(Rule):
    """Base: `names` are the sides that it compares; `dense` is its formula on the whole batch."""

    names: Sequence[str] = ("a", "b")

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(SCALE, dtype=torch.float64))

    def dense(self, w: Whole) -> Tensor:
        raise AssertionError


class Mined(_Rule):
    """Each anchor's sum has all mined negatives, its own included, but none with its own content."""

    names = ("a", "b", "mined")

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [("a", "b"), ("a", "mined")]

    def tile(self, t: Tile) -> Reductions:
        own_mined = t.own & (t.column_view == "mined")
        return {"lse": row_lse(self.scale * t.scores + 0.7 * own_mined), "rest": row_sum(t.scores**2, over="negatives")}

    def finish(self, s: Samples) -> Tensor:
        return s["lse"] + 0.1 * s["rest"] - self.scale * s.own("a", "b")

    def dense(self, w: Whole) -> Tensor:
        scores, mined = w.a @ w.b.T, w.a @ w.mined.T
        dead = (w.weight == 0)[:, None] | (w.weight == 0)[w.owner][None]
        out = dead | (w.content[:, None] == w.mined_content)
        bonus = 0.7 * (torch.arange(len(w.a))[:, None] == w.owner)
        both = torch.cat(
            [
                (self.scale * scores).masked_fill(w.excluded, -torch.inf),
                (self.scale * mined + bonus).masked_fill(out, -torch.inf),
            ],
            1,
        )
        rest = (scores**2).masked_fill(w.excluded | w.own, 0).sum(1) + (mined**2).masked_fill(out, 0).sum(1)
        return w.mean(both.logsumexp(1) + 0.1 * rest - self.scale * scores.diagonal())


class Dual(_Rule):
    """Constant columns with statistics of their own that a second pass reads, with gradients through both."""

    names = ("a", "prototypes")

    def passes(self) -> Sequence[Tiler]:
        return [self.first, self.tile]

    def first(self, t: Tile) -> Reductions:
        return {"potential": column_lse(self.scale * t.scores)}

    def tile(self, t: Tile) -> Reductions:
        return {"lse": row_lse(self.scale * t.scores - t.column("potential"))}

    def finish(self, s: Samples) -> Tensor:
        return s["lse"]

    def dense(self, w: Whole) -> Tensor:
        logits = self.scale * w.a @ w.prototypes.T
        potential = logits.masked_fill((w.weight == 0)[:, None], -torch.inf).logsumexp(0)
        return w.mean((logits - potential).logsumexp(1))


class Distil(_Rule):
    """The student's softmax against a teacher's, whose views nobody trains; two channels of one comparison."""

    names = ("a", "b", "teacher_a", "teacher_b")

    def comparisons(self, views: Sequence[str]) -> list[Comparison]:
        return [Comparison("a", "b", {"teacher": ("teacher_a", "teacher_b"), "mixed": ("a", "teacher_b")})]

    def passes(self) -> Sequence[Tiler]:
        return [self.first, self.tile]

    def first(self, t: Tile) -> Reductions:
        return {"lse": row_lse(self.scale * t.scores), "teacher": row_lse(5 * t.channels["teacher"])}

    def tile(self, t: Tile) -> Reductions:
        chance = (5 * t.channels["teacher"] - t.row("teacher")).exp()
        gap = 5 * t.channels["teacher"] - t.row("teacher") - self.scale * t.scores + t.row("lse")
        return {"kl": row_sum(chance * gap), "mixed": row_sum(t.channels["mixed"] ** 2)}

    def finish(self, s: Samples) -> Tensor:
        return s["kl"] + 0.1 * s["mixed"]

    def dense(self, w: Whole) -> Tensor:
        keep = (w.weight > 0)[:, None]
        student = (self.scale * w.a @ w.b.T).masked_fill(w.excluded, -torch.inf).log_softmax(1).where(keep, 0)
        teacher = (5 * w.teacher_a @ w.teacher_b.T).masked_fill(w.excluded, -torch.inf).log_softmax(1).where(keep, 0)
        finite = ~w.excluded
        kl = kl_div(student.where(finite, 0), teacher.where(finite, 0), reduction="none", log_target=True)
        mixed = ((w.a @ w.teacher_b.T) ** 2).masked_fill(w.excluded, 0).sum(1)
        return w.mean(kl.masked_fill(w.excluded, 0).sum(1) + 0.1 * mixed)


def max_sim(rows: Tensor, columns: Tensor, known_rows: Known, known_columns: Known) -> Tensor:
    """Khattab and Zaharia 2020, eq. 3: each row token's best column token, summed."""
    scores = torch.einsum("rtd,csd->rcts", rows, columns)
    scores = scores.masked_fill(~known_columns.meta["tokens"][None, :, None], -torch.inf).amax(3)
    return scores.masked_fill(~known_rows.meta["tokens"][:, None], 0).sum(2)


class Late(_Rule):
    names = ("tokens_a", "tokens_b")

    def comparisons(self, views: Sequence[str]) -> list[Comparison]:
        return [Comparison("tokens_a", "tokens_b", score=max_sim, cost=9)]

    def tile(self, t: Tile) -> Reductions:
        logits = self.scale * t.scores
        return {"lse": [row_lse(logits), column_lse(logits)], "own": row_sum(logits, mask=t.own)}

    def finish(self, s: Samples) -> Tensor:
        return s["lse", "tokens_a"] + s["lse", "tokens_b"] - 2 * s["own"]

    def dense(self, w: Whole) -> Tensor:
        scores = torch.einsum("itd,jsd->ijts", w.tokens_a, w.tokens_b)
        best = scores.masked_fill(~w.token_mask[None, :, None], -torch.inf).amax(3)
        logits = self.scale * best.masked_fill(~w.token_mask[:, None], 0).sum(2)
        masked = logits.masked_fill(w.excluded, -torch.inf)
        return w.mean(masked.logsumexp(1) + masked.logsumexp(0) - 2 * logits.diagonal())


class Tops(_Rule):
    """The two hardest of each row over two views, and of each column; where they stand."""

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [("a", "b"), ("a", "a")]

    def tile(self, t: Tile) -> Reductions:
        found: dict[str, object] = {"hard": row_top(self.scale * t.scores, k=3)}
        if t.column_view == "b":
            found["anchors"] = column_top(self.scale * t.scores, k=2)
        return found  # type: ignore[return-value]

    def finish(self, s: Samples) -> Tensor:
        hard, anchors = s["hard"], s["anchors"]
        places = (s["hard.index"] * hard.isfinite()).sum(1) + 2 * (s["anchors.index"] * anchors.isfinite()).sum(1)
        return (
            (hard.where(hard.isfinite(), 0) ** 2).sum(1)
            + (anchors.where(anchors.isfinite(), 0) ** 3).sum(1)
            + places.to(hard.dtype)
        )

    def dense(self, w: Whole) -> Tensor:
        out = w.excluded | w.own
        scores = (self.scale * w.a @ w.b.T).masked_fill(out, -torch.inf)
        within = (self.scale * w.a @ w.a.T).masked_fill(out, -torch.inf)

        def top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
            values = torch.cat([values, values.new_full((len(values), k), -torch.inf)], 1)
            found = values.topk(k, 1)
            some = found.values.isfinite()
            return found.values.where(some, 0), (found.indices * some).sum(1)

        hard, places = top(torch.cat([scores, within], 1), 3)
        anchors, others = top(scores.T, 2)
        return w.mean((hard**2).sum(1) + (anchors**3).sum(1) + (places + 2 * others).double())


class TopsOfBothKinds(_Rule):
    """The three hardest of each b among rows (of a) and columns (of b): their places must not be mistaken."""

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [("a", "b"), ("b", "b")]

    def tile(self, t: Tile) -> Reductions:
        scores = self.scale * t.scores
        return {"hard": row_top(scores, k=3) if t.row_view == "b" else column_top(scores, k=3)}

    def finish(self, s: Samples) -> Tensor:
        hard = s["hard"]
        places = (s["hard.index"] * hard.isfinite()).sum(1)
        return (hard.where(hard.isfinite(), 0) ** 2).sum(1) + places.to(hard.dtype)

    def dense(self, w: Whole) -> Tensor:
        scores = self.scale * torch.cat([w.b @ w.a.T, w.b @ w.b.T], 1)
        scores = scores.masked_fill((w.excluded | w.own).repeat(1, 2), -torch.inf)
        found = torch.cat([scores, scores.new_full((len(scores), 3), -torch.inf)], 1).topk(3, 1)
        some = found.values.isfinite()
        return w.mean((found.values.where(some, 0) ** 2).sum(1) + (found.indices * some).sum(1).double())


class Chance(_Rule):
    """Entries that a coin drops; the same coins in recomputation and on any number of workers. And targets."""

    def tile(self, t: Tile) -> Reductions:
        keep = t.uniform(seed=3) < 0.6
        return {
            "kept": [row_lse(self.scale * t.scores, mask=keep | t.own), column_sum(t.scores**2, mask=keep)],
            "soft": row_sum(t.targets["soft"] * t.scores),
        }

    def finish(self, s: Samples) -> Tensor:
        return s["kept", "a"] + s["kept", "b"] - s["soft"]

    def dense(self, w: Whole) -> Tensor:
        coins = torch.stack(
            [randomness.uniform(3, 5, key.expand(len(w.keys)), w.keys, dtype=torch.float64) for key in w.keys]
        )
        keep, scores = coins < 0.6, w.a @ w.b.T
        rows = (self.scale * scores).masked_fill(w.excluded | ~(keep | w.own), -torch.inf).logsumexp(1)
        columns = (scores**2).masked_fill(w.excluded | ~keep, 0).sum(0)
        soft = (w.targets * scores).masked_fill(w.excluded, 0).sum(1)
        return w.mean(rows + columns - soft)


class Partial(_Rule):
    """View b is missing of some samples: they are no candidates, and their term is left out of the mean."""

    names = ("a", "present b", "teacher_a")

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [("a", "present b"), ("a", "teacher_a")]

    def tile(self, t: Tile) -> Reductions:
        if t.column_view == "teacher_a":
            return {"always": row_lse(t.scores)}
        logits = self.scale * t.scores
        return {"lse": [row_lse(logits), column_lse(logits)]}

    def finish(self, s: Samples) -> Sequence[Term]:
        both = (s["lse", "a"] + s["lse", "present b"]).square()
        return [Term(both), Term(s["always"], valid=s.valid("a", "teacher_a"), factor=2)]

    def dense(self, w: Whole) -> Tensor:
        dead = ~w.present_b | (w.weight == 0)
        logits = (self.scale * w.a @ w.b.T).masked_fill(w.excluded | dead[None], -torch.inf)
        rows = logits.logsumexp(1)
        columns = logits[:, ~dead].logsumexp(0)
        both = torch.zeros_like(rows)
        both = both.index_put((~dead,), (rows[~dead] + columns).square())
        always = (w.a @ w.teacher_a.T).masked_fill(w.excluded, -torch.inf).logsumexp(1)
        return w.mean(both, w.present_b) + 2 * w.mean(always)


RULES: dict[str, type[_Rule]] = {
    rule.__name__: rule for rule in (Mined, Dual, Distil, Late, Tops, TopsOfBothKinds, Chance, Partial)
}
LEAVES = ("a", "b", "tokens_a", "tokens_b", "mined", "prototypes")


def sides(w: Whole, mine: slice, workers: Workers, names: Sequence[str]) -> tuple[list[Side], dict[str, Tensor]]:
    """The sides of one worker's rows, and their leaves by name."""
    leaves = {name: getattr(w, name) for name in LEAVES}
    belongs = (w.owner >= mine.start) & (w.owner < mine.stop)
    local = {
        name: value.clone() if name == "prototypes" else value[belongs] if name == "mined" else value[mine].clone()
        for name, value in leaves.items()
    }
    for value in local.values():
        value.requires_grad_()
    weight, meta = w.weight[mine], {"key": w.keys[mine], "tokens": w.token_mask[mine]}
    layout = workers.layout(len(weight), weight.device)
    views = {
        "a": local["a"],
        "b": local["b"],
        "present b": local["b"],
        "teacher_a": w.teacher_a[mine],
        "teacher_b": w.teacher_b[mine],
        "tokens_a": local["tokens_a"],
        "tokens_b": local["tokens_b"],
    }
    made = {side.name: side for side in sides_of(views, layout, weight, content=w.content[mine, None], meta=meta)}
    made["present b"] = replace(made["present b"], weight=weight * w.present_b[mine])
    alive = (weight > 0).double()[w.owner[belongs] - mine.start]
    sample = made["a"].sample[w.owner[belongs] - mine.start]
    made["mined"] = Side("mined", local["mined"], sample, alive, w.mined_content[belongs, None], role="negative")
    nobody = torch.full((PROTOTYPES,), -1)
    made["prototypes"] = Side(
        "prototypes", local["prototypes"], nobody, torch.ones(PROTOTYPES, dtype=torch.float64), replicated=True
    )
    return [made[name] for name in names], local


def on_worker(
    workers: Workers, name: str, rows: tuple[int, ...], hard: bool, exchange: Exchange, tiling: Tiling
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    w = whole(rows, hard)
    start = sum(rows[: workers.rank])
    mine = slice(start, start + rows[workers.rank])
    rule = RULES[name]()
    views, local = sides(w, mine, workers, rule.names)
    targets = {"soft": w.targets[mine]}
    loss, _ = evaluate(rule, views, workers, exchange, tiling, targets=targets, clock=Clock(step=5))
    loss.backward()
    slopes = {key: torch.zeros_like(x) if x.grad is None else x.grad for key, x in local.items()}
    assert rule.scale.grad is not None
    return loss.detach(), slopes, rule.scale.grad


def assert_close(value: Tensor, expected: Tensor) -> None:
    assert float((value - expected).norm() / (expected.norm() + 1e-3)) < 1e-10


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("rows", [(9,), (4, 7), (5, 0, 6), (3, 2, 0, 6)], ids=str)
@pytest.mark.parametrize("tiling", [Tiling(), Tiling(2, 3)], ids=["one tile", "2 x 3"])
@pytest.mark.parametrize("hard", [False, True], ids=["plain", "hard"])
def test_rule_equals_dense_formula(
    pool: Pool, name: str, exchange: Exchange, rows: tuple[int, ...], tiling: Tiling, hard: bool
) -> None:
    w = whole(rows, hard)
    leaves = {key: getattr(w, key).clone().requires_grad_() for key in LEAVES}
    rule = RULES[name]()
    loss = rule.dense(replace(w, **leaves))
    expected = torch.autograd.grad(loss, [*leaves.values(), rule.scale], materialize_grads=True, allow_unused=True)
    answers = pool.run(on_worker, len(rows), name, rows, hard, exchange, tiling)
    size = len(rows)
    for answer in answers:
        assert_close(answer[0], loss.detach())
    for key, slope in zip(leaves, expected, strict=False):
        parts = [answer[1][key] for answer in answers]
        found = torch.stack(parts).sum(0) if key == "prototypes" else torch.cat(parts)
        assert_close(found / size, slope)
    assert_close(torch.stack([answer[2] for answer in answers]).mean(0), expected[-1])


def _ties(workers: Workers, exchange: Exchange, tiling: Tiling) -> Tensor:
    """The places of the three largest of each row where all scores are equal."""
    view = torch.ones(3, 2, dtype=torch.float64)
    layout = workers.layout(3, view.device)

    class Places(Rule):
        def tile(self, t: Tile) -> Reductions:
            return {"top": row_top(t.scores, k=3)}

        def finish(self, s: Samples) -> Tensor:
            places.append(s["top.index"])
            return s["top"].sum(1)

    places: list[Tensor] = []
    evaluate(Places(), sides_of({"a": view, "b": view}, layout, torch.ones(3).double()), workers, exchange, tiling)
    return places[0]


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("tiling", [Tiling(), Tiling(2, 2), Tiling(1, 4)], ids=str)
def test_ties_go_to_the_first_column(pool: Pool, exchange: Exchange, tiling: Tiling) -> None:
    found = torch.cat(pool.run(_ties, 3, exchange, tiling))
    expected = torch.tensor([[j for j in range(9) if j != i][:3] for i in range(9)])
    assert torch.equal(found, expected)


def _in_pairs(workers: Workers, rows: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Candidates are shared by workers 0, 1 and by 2, 3; the mean is over all four."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    near = Workers.current(groups[workers.rank // 2], averaged_by=workers.averaged_by)  # type: ignore[arg-type]
    w = whole(rows, hard=True)
    start = sum(rows[: workers.rank])
    mine = slice(start, start + rows[workers.rank])
    views, local = sides(w, mine, near, ("a", "b"))

    class Clip(_Rule):
        def tile(self, t: Tile) -> Reductions:
            return {"lse": [row_lse(self.scale * t.scores), column_lse(self.scale * t.scores)]}

        def finish(self, s: Samples) -> Tensor:
            return s["lse", "a"] + s["lse", "b"] - 2 * self.scale * s.own("a", "b")

    loss, _ = evaluate(Clip(), views, workers, candidates=near)
    loss.backward()
    assert local["a"].grad is not None
    return loss.detach(), local["a"].grad


def test_sub_groups_share_candidates(pool: Pool) -> None:
    """L = sum over sub-groups S of n_S / n L_S, with n the weight of the valid samples."""
    rows = (3, 4, 0, 5)
    w = whole(rows, hard=True)
    a = w.a.clone().requires_grad_()
    apart = torch.arange(12) < 7
    excluded = w.excluded | (apart[:, None] != apart)
    scores = SCALE * a @ w.b.T
    masked = scores.masked_fill(excluded, -torch.inf)
    loss = w.mean(masked.logsumexp(1) + masked.logsumexp(0) - 2 * scores.diagonal())
    (expected,) = torch.autograd.grad(loss, a)
    answers = pool.run(_in_pairs, 4, rows)
    for answer in answers:
        assert_close(answer[0], loss.detach())
    assert_close(torch.cat([answer[1] for answer in answers]) / 4, expected)


def _choices(workers: Workers, sizes: Sequence[tuple[int, int]]) -> list[str]:
    exchanger = Exchanger("auto")
    return [exchanger(rows, width, 4, workers) for rows, width in sizes]


def test_auto_gathers_what_fits_and_circulates_what_does_not(pool: Pool) -> None:
    small, huge = (1024, 512), (1 << 40, 4096)
    assert pool.run(_choices, 2, [small, huge]) == [["gather", "ring"]] * 2
    assert pool.run(_choices, 1, [huge]) == [["gather"]]


def test_uniform_numbers_are_uniform_and_independent() -> None:
    rows, columns = torch.arange(400)[:, None], torch.arange(500)
    numbers = randomness.uniform(1, 2, rows, columns, dtype=torch.float64)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    histogram = torch.histc(numbers, 50) / numbers.numel() * 50
    assert float((histogram - 1).abs().max()) < 0.06  # 4 standard errors of 200,000 numbers in 50 bins
    others: list[Callable[[], Tensor]] = [
        lambda: randomness.uniform(2, 2, rows, columns, dtype=torch.float64),
        lambda: randomness.uniform(1, 3, rows, columns, dtype=torch.float64),
        lambda: randomness.uniform(1, 2, rows + 1, columns, dtype=torch.float64),
        lambda: randomness.uniform(1, 2, columns, rows, dtype=torch.float64),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([numbers.flatten(), other().flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.01
    drawn = randomness.normal(1, 2, rows, columns, dtype=torch.float64)
    moments: Mapping[int, float] = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}
    for power, expected in moments.items():
        assert abs(float((drawn**power).mean()) - expected) < 0.1
