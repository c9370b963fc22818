"""The exactness walk: every registered objective, over real workers, equals its dense formula in float64.

Loss, gradients of the encoder's weights and of the objective's own parameters, and the state after three optimizer
steps; with 1 to 4 workers, gather and ring, small and large tiles, cached and plain gradients, even and uneven batches,
a worker without samples, repeated content and masked samples. The cases cover every pair of those choices.
"""

from __future__ import annotations

import pytest

from cl.objectives import OBJECTIVES
from tests.distributed.pool import Pool
from tests.distributed.references import REFERENCES
from tests.distributed.walk import CASES, STEPS, Case, by_formula, error, on_worker


def test_every_objective_has_a_reference() -> None:
    assert {entry.name for entry in OBJECTIVES.entries()} == REFERENCES.keys()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", REFERENCES)
def test_objective_equals_its_formula(pool: Pool, name: str, case: Case) -> None:
    bound = REFERENCES[name].tolerance
    for settings in REFERENCES[name].settings:
        expected = by_formula(name, settings, case)
        for answer in pool.run(on_worker, len(case.rows), name, settings, case):
            for step in range(STEPS):
                assert error(answer.losses[step], expected.losses[step]) <= bound
                assert answer.gradients[step].keys() == expected.gradients[step].keys()
                for key, slope in expected.gradients[step].items():
                    assert error(answer.gradients[step][key], slope) <= bound, (settings, step, key)
            for key, value in expected.state.items():
                assert error(answer.state[key].double(), value.double()) <= bound, (settings, key)
