"""The exactness walk: every registered objective, over real workers, equals its dense formula in float64.

Loss, gradients of the encoder's weights and of the objective's own parameters, and the state after three optimizer
steps; with 1 to 4 workers, gather and ring, small and large tiles, cached and plain gradients, even and uneven batches,
a worker without samples, repeated content and masked samples. The cases cover every pair of those choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl.engine.cache import CachedBatch
from cl.engine.collectives import Workers
from cl.objectives import OBJECTIVES, ObjectiveConfig, build_objective
from cl.pairs import Pairs
from tests.distributed.pool import Pool, gradient
from tests.distributed.references import REFERENCES, Batch

FEATURES, DIMENSIONS, STEPS, RATE = 5, 6, 3, 0.3


@dataclass(frozen=True)
class Case:
    rows: tuple[int, ...]
    exchange: str
    tile: int
    cached: bool
    hard: bool  # repeated content and masked samples


CASES = [
    Case((8,), "gather", 256, False, False),
    Case((8,), "ring", 3, True, True),
    Case((8,), "gather", 1, True, False),
    Case((4, 4), "gather", 3, True, True),
    Case((4, 4), "ring", 256, False, False),
    Case((3, 6), "gather", 256, True, False),
    Case((3, 6), "ring", 1, False, True),
    Case((0, 7), "ring", 3, True, False),
    Case((3, 3, 3), "ring", 256, True, True),
    Case((3, 3, 3), "gather", 1, False, False),
    Case((5, 2, 3), "gather", 3, False, True),
    Case((4, 0, 5), "gather", 256, True, True),
    Case((2, 2, 2, 2), "ring", 3, False, False),
    Case((1, 4, 2, 3), "gather", 1, True, True),
    Case((1, 4, 2, 3), "ring", 256, False, False),
    Case((3, 0, 2, 4), "ring", 1, True, True),
]


class Encoder(nn.Module):
    """Two linear towers onto the sphere."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (
            nn.Parameter(torch.randn(FEATURES, DIMENSIONS, generator=generator, dtype=torch.float64)) for _ in range(2)
        )

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: normalize(x @ getattr(self, name), dim=1) for name, x in features.items()}


def global_batch(case: Case, step: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Features by view, content [N, 1], weight [N]."""
    generator = torch.Generator().manual_seed(1000 * step + sum(case.rows))
    count = sum(case.rows)
    features = {name: torch.randn(count, FEATURES, generator=generator, dtype=torch.float64) for name in ("a", "b")}
    content, weight = torch.arange(count)[:, None], torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
    if case.hard:
        content = torch.randint(0, count - 2, (count, 1), generator=generator)
        weight[2::4] = 0
    return features, content, weight


Answer = tuple[list[Tensor], list[dict[str, Tensor]], dict[str, Tensor]]


def on_worker(workers: Workers, name: str, settings: dict[str, Any], case: Case) -> Answer:
    """Losses and averaged gradients of each step, and the state at the end, of one worker."""
    fields = {"exchange": case.exchange, "tile_rows": case.tile, "tile_columns": case.tile, **settings}
    encoder = Encoder()
    objective = build_objective(ObjectiveConfig.model_validate({"name": name, **fields})).double()
    modules = nn.ModuleDict({"encoder": encoder, "objective": objective})
    start = sum(case.rows[: workers.rank])
    mine = slice(start, start + case.rows[workers.rank])
    losses, gradients = [], []
    for step in range(STEPS):
        features, content, weight = global_batch(case, step)
        local = {view: x[mine] for view, x in features.items()}
        content, weight = content[mine], weight[mine]

        def lose(views: Any) -> Any:
            return objective(Pairs(views, content=content, weight=weight), workers)  # noqa: B023 - called at once

        modules.zero_grad()
        if case.cached:
            chunks = [{v: x[i : i + 2] for v, x in local.items()} for i in range(0, max(len(weight), 1), 2)]
            parameters = list(objective.parameters())
            batch = CachedBatch(lambda c, skip: encoder(c), chunks, device=torch.device("cpu"))
            outcome = batch.evaluate(lose, parameters)
            batch.backward()
        else:
            outcome = lose(encoder(local))
            outcome.loss.backward()
        losses.append(outcome.loss.detach())
        found = {}
        for key, parameter in modules.named_parameters():
            slope = gradient(parameter)
            workers.all_reduce(slope)
            slope /= workers.averaged_by
            found[key] = slope.clone()
            parameter.data -= RATE * slope
        gradients.append(found)
    return losses, gradients, modules.state_dict()


def by_formula(name: str, settings: dict[str, Any], case: Case) -> Answer:
    encoder = Encoder()
    objective = build_objective(ObjectiveConfig.model_validate({"name": name, **settings})).double()
    modules = nn.ModuleDict({"encoder": encoder, "objective": objective})
    losses, gradients = [], []
    for step in range(STEPS):
        features, content, weight = global_batch(case, step)
        batch = Batch(encoder(features), weight, content == content.T)
        loss = REFERENCES[name].loss(batch, dict(objective.named_parameters()), settings)
        modules.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({key: gradient(parameter).clone() for key, parameter in modules.named_parameters()})
        for parameter in modules.parameters():
            parameter.data -= RATE * gradient(parameter)
    return losses, gradients, modules.state_dict()


def error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / (expected.norm() + 1e-3))


def test_every_objective_has_a_reference() -> None:
    assert {entry.name for entry in OBJECTIVES.entries()} == REFERENCES.keys()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", REFERENCES)
def test_objective_equals_its_formula(pool: Pool, name: str, case: Case) -> None:
    for settings in REFERENCES[name].settings:
        losses, gradients, state = by_formula(name, settings, case)
        for answer in pool.run(on_worker, len(case.rows), name, settings, case):
            for step in range(STEPS):
                assert error(answer[0][step], losses[step]) <= 1e-10
                for key, expected in gradients[step].items():
                    assert error(answer[1][step][key], expected) <= 1e-10, key
            for key, expected in state.items():
                assert error(answer[2][key], expected) <= 1e-10, key
