"""What the exactness walk is made of: the cases, the batches, and an objective's steps on a worker and by formula."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl.engine.cache import CachedBatch
from cl.engine.collectives import Workers
from cl.objectives import OBJECTIVES, ObjectiveConfig, build_objective
from cl.pairs import Clock, Extra, Pairs
from tests.distributed.pool import gradient
from tests.distributed.references import REFERENCES, Batch, Reference
from tests.distributed.references.batch import More

FEATURES, DIMENSIONS, TOKENS, STEPS, RATE = 5, 6, 3, 3, 0.3


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...]
    exchange: str
    tile: int
    cached: bool
    hard: bool  # repeated content and masked samples


# Every pair of choices (workers, evenness, exchange, tile, cached, hard) occurs.
CASES = [
    Case((8,), "gather", 256, True, True),
    Case((9,), "ring", 5, False, True),
    Case((8,), "ring", 4, False, False),
    Case((0, 8), "ring", 256, False, True),
    Case((4, 4), "gather", 5, True, False),
    Case((3, 6), "gather", 4, True, False),
    Case((3, 3, 3), "ring", 256, True, False),
    Case((4, 2, 3), "gather", 5, False, True),
    Case((4, 0, 5), "ring", 4, False, True),
    Case((1, 3, 2, 3), "ring", 256, True, True),
    Case((3, 0, 2, 4), "gather", 5, True, False),
    Case((2, 2, 2, 2), "ring", 4, False, True),
]


class Encoder(nn.Module):
    """Linear towers onto the sphere, one a view; teachers are constant."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        names = ["a", "b", "c", "a_teacher", "b_teacher"]
        self.towers = nn.ParameterDict(
            {
                name: nn.Parameter(
                    torch.randn(FEATURES, DIMENSIONS, generator=generator, dtype=torch.float64),
                    requires_grad=not name.endswith("teacher"),
                )
                for name in names
            }
        )

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings by view; token-wise views and further embeddings go through the tower of their letter."""
        towers = {"negatives": "b", "positives": "b", "a_tokens": "a", "b_tokens": "b"}
        return {name: normalize(x @ self.towers[towers.get(name, name)], dim=-1) for name, x in features.items()}


@dataclass(frozen=True)
class Raw:
    """A global batch before the towers."""

    features: dict[str, Tensor]
    batch: Batch  # without embeddings


def raw_batch(case: Case, step: int, reference: Reference) -> Raw:
    """The same numbers whatever the reference asks for, then only what it asks for."""
    features, batch = _numbers(sum(case.rows), case.hard, step)
    return Raw(
        {name: features[name] for name in (*reference.views, *reference.extra)},
        replace(
            batch,
            present=batch.present if reference.missing else {},
            tokens={name: value for name, value in batch.tokens.items() if name in reference.views},
            extra={name: batch.extra[name] for name in reference.extra},
            token_ids={name: value for name, value in batch.token_ids.items() if name in reference.views},
        ),
    )


@functools.cache
def _numbers(count: int, hard: bool, step: int) -> tuple[dict[str, Tensor], Batch]:
    """Every view, and all that is known, of a batch of `count` samples."""
    generator = torch.Generator().manual_seed(1000 * step + count)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    features = {name: randn(count, FEATURES) for name in ("a", "b")}
    content, weight = torch.arange(count), torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
    if hard:
        content = randint(count - 2, count)
        weight[2::4] = 0
    features["c"] = randn(count, FEATURES)
    features["a_teacher"] = features["a"] + 0.3 * randn(count, FEATURES)
    features["b_teacher"] = features["b"] + 0.3 * randn(count, FEATURES)
    features["a_tokens"], features["b_tokens"] = randn(count, TOKENS, FEATURES), randn(count, TOKENS, FEATURES)
    lengths = {name: randint(TOKENS, count) + 1 for name in ("a_tokens", "b_tokens")}
    extra = {}
    for name in ("negatives", "positives"):
        owner = torch.arange(count).repeat_interleave(randint(3, count))  # none, one or two of each sample
        features[name] = randn(len(owner), FEATURES)
        unrelated = 1000 + torch.arange(len(owner)) if name == "negatives" else content[owner]
        extra[name] = More(features[name], owner, unrelated)
    if hard and len(extra["negatives"].content):
        extra["negatives"].content[0] = content[0]  # a mined negative that is another sample's own content
    ids = torch.stack([torch.arange(count) % 5 + 7 * step % 10, torch.zeros(count, dtype=torch.int64)], 1)
    if not hard:
        ids[:, 0] = torch.arange(count) + 3 * step  # unique in a step; some come again in a later one
    soft = torch.rand(count, count, generator=generator, dtype=torch.float64)
    levels = torch.stack([randint(2, count), randint(4, count)], 1)
    times = randint(5, count)[:, None] + torch.tensor([1, 7])  # t < T of each sample's middle and end
    batch = Batch(
        views={},
        weight=weight,
        content=content,
        ids=ids,
        labels={
            "class": randint(3, count),
            "levels": torch.stack([levels[:, 0], 4 * levels[:, 0] + levels[:, 1]], 1),
            "tags": (torch.rand(count, 4, generator=generator) < 0.4).to(torch.float64),
            "score": randn(count),
            "vector": randn(count, 3),
            "source": randint(2, count),
            "cluster": randint(3, count),
            "time": times,
        },
        present={"c": torch.rand(count, generator=generator) < 0.7},
        tokens={name: torch.arange(TOKENS) < lengths[name][:, None] for name in lengths},
        extra=extra,
        targets={"soft": soft / soft.sum(1, keepdim=True)},
        token_ids={"b_tokens": randint(7, count, TOKENS)},
        clock=Clock(step, STEPS, step // 2, 2),
    )
    return features, batch


@dataclass(frozen=True)
class Answer:
    losses: list[Tensor]
    gradients: list[dict[str, Tensor]]
    state: dict[str, Tensor]


def build(name: str, settings: Mapping[str, Any]) -> nn.ModuleDict:
    """Encoder and objective; random weights of the objective are the same everywhere."""
    torch.manual_seed(0)
    objective = build_objective(ObjectiveConfig.model_validate({"name": name, **settings}), DIMENSIONS)
    return nn.ModuleDict({"encoder": Encoder(), "objective": objective.double()})


def in_case(name: str, settings: Mapping[str, Any], case: Case) -> dict[str, Any]:
    """The settings of an objective, and of those that it is made of, with the exchange and tiles of a case."""
    fields = {"exchange": case.exchange, "tile_rows": case.tile, "tile_columns": case.tile}
    found: dict[str, Any] = {key: value for key, value in fields.items() if key in OBJECTIVES[name].Config.model_fields}
    found |= settings
    if "objective" in found:
        inner = found["objective"]
        found["objective"] = {"name": inner["name"], **in_case(inner["name"], inner, case)}
    if "terms" in found:
        found["terms"] = {key: {**term, **in_case("sum", term, case)} for key, term in found["terms"].items()}
    return found


def on_worker(workers: Workers, name: str, settings: Mapping[str, Any], case: Case) -> Answer:
    """Losses and averaged gradients of each step, and the state at the end, of one worker."""
    modules = build(name, in_case(name, settings, case))
    encoder, objective = modules["encoder"], modules["objective"]
    reference = REFERENCES[name]
    start = sum(case.rows[: workers.rank])
    mine = slice(start, start + case.rows[workers.rank])
    losses, gradients = [], []
    for step in range(STEPS):
        raw = raw_batch(case, step, reference)
        owners = {n: e.owner for n, e in raw.batch.extra.items()}
        belongs = {n: (owner >= mine.start) & (owner < mine.stop) for n, owner in owners.items()}
        local = {n: x[belongs[n]] if n in belongs else x[mine] for n, x in raw.features.items()}

        def lose(embeddings: Any) -> Any:
            batch = raw.batch  # noqa: B023 - called at once
            here = belongs  # noqa: B023
            extra = {
                n: Extra(
                    embeddings[n],
                    more.owner[here[n]] - mine.start,
                    "negative" if n == "negatives" else "positive",
                    content=more.content[here[n], None],
                )
                for n, more in batch.extra.items()
            }
            pairs = Pairs(
                {n: embeddings[n] for n in reference.views},
                ids=batch.ids[mine],
                content=batch.content[mine, None],
                weight=batch.weight[mine],
                labels={n: value[mine] for n, value in batch.labels.items()},
                present={n: value[mine] for n, value in batch.present.items()},
                tokens={n: value[mine] for n, value in batch.tokens.items()},
                token_ids={n: value[mine] for n, value in batch.token_ids.items()},
                extra=extra,
                targets={n: value[mine] for n, value in batch.targets.items()},
                clock=batch.clock,
            )
            return objective(pairs, workers)

        modules.zero_grad()
        if case.cached:
            count = max((len(x) for x in local.values()), default=0)
            chunks = [{n: x[i : i + 2] for n, x in local.items()} for i in range(0, max(count, 1), 2)]
            cached = CachedBatch(lambda c, skip: encoder(c), chunks, device=torch.device("cpu"))
            outcome = cached.evaluate(lose, list(objective.parameters()))
            cached.backward()
        else:
            outcome = lose(encoder(local))
            outcome.loss.backward()
        losses.append(outcome.loss.detach())
        trained = {key: p for key, p in modules.named_parameters() if p.requires_grad}
        slopes = [torch.zeros_like(p) if p.grad is None else gradient(p) for p in trained.values()]
        found = {}
        for (key, parameter), total in zip(trained.items(), workers.all_reduce_together(slopes), strict=True):
            found[key] = total / workers.averaged_by
            parameter.data -= RATE * found[key]
        gradients.append(found)
    return Answer(losses, gradients, dict(modules.state_dict()))


def by_formula(name: str, settings: Mapping[str, Any], case: Case) -> Answer:
    """The same steps in one process by the dense reference; `state` holds parameters, and what the reference says."""
    modules = build(name, settings)
    reference = REFERENCES[name]
    memory: dict[str, Any] = {}
    losses, gradients = [], []
    for step in range(STEPS):
        raw = raw_batch(case, step, reference)
        embeddings = modules["encoder"](raw.features)
        batch = raw.batch
        extra = {n: More(embeddings[n], more.owner, more.content) for n, more in batch.extra.items()}
        whole = Batch(
            {n: embeddings[n] for n in reference.views},
            batch.weight,
            batch.content,
            batch.ids,
            batch.labels,
            batch.present,
            batch.tokens,
            extra,
            batch.targets,
            batch.clock,
            batch.token_ids,
            memory,
        )
        loss = reference.loss(whole, dict(modules["objective"].named_parameters()), settings)
        trained = {key: p for key, p in modules.named_parameters() if p.requires_grad}
        slopes = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, materialize_grads=True)
        losses.append(loss.detach())
        gradients.append({key: slope.clone() for key, slope in zip(trained, slopes, strict=True)})
        for parameter, slope in zip(trained.values(), slopes, strict=True):
            parameter.data -= RATE * slope
    state = {key: value.detach() for key, value in modules.named_parameters()}
    state |= {f"objective.{key}": value for key, value in memory.get("state", {}).items()}
    return Answer(losses, gradients, state)


def error(value: Tensor, expected: Tensor) -> float:
    """Relative to the reference; zeros are compared with 1e-3."""
    return float((value - expected).norm() / (expected.norm() + 1e-3))
