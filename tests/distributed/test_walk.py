"""The exactness walk: every registered objective, over real workers, equals its dense formula in float64.

Loss, gradients of the encoder's weights and of the objective's own parameters, and the state after three optimizer
steps; with 1 to 4 workers, gather and ring, small and large tiles, cached and plain gradients, even and uneven batches,
a worker without samples, repeated content and masked samples. The cases cover every pair of those choices; one
objective of each kind is walked through their whole product, and settings other than an objective's first through some.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence

import pytest

from cl.objectives import OBJECTIVES
from tests.distributed.pool import Pool
from tests.distributed.references import REFERENCES
from tests.distributed.walk import CASES, STEPS, Answer, Case, by_formula, error, on_worker


def test_every_objective_has_a_reference() -> None:
    assert {entry.name for entry in OBJECTIVES.entries()} == REFERENCES.keys()


# Settings of an objective other than its first go through these, in which every single choice occurs.
FURTHER = [CASES[n] for n in (1, 5, 8, 9)]


@pytest.mark.parametrize("name", REFERENCES)
def test_objective_equals_its_formula(pool: Pool, name: str) -> None:
    settings = range(len(REFERENCES[name].settings))
    compare(pool, name, [(case, number) for case in CASES for number in settings if number == 0 or case in FURTHER])


def choices(case: Case) -> dict[str, object]:
    found: dict[str, object] = {"workers": len(case.rows), "exchange": case.exchange, "tile": case.tile}
    found |= {"cached": case.cached, "hard": case.hard}
    if len(case.rows) > 1:
        found["evenness"] = "even" if len(set(case.rows)) == 1 else "one empty" if 0 in case.rows else "uneven"
    return found


def test_cases_hold_every_pair_of_choices() -> None:
    occurring: dict[str, set[object]] = {}
    for case in CASES:
        for name, value in choices(case).items():
            occurring.setdefault(name, set()).add(value)
    counts = {name: len(values) for name, values in occurring.items()}
    assert counts == {"workers": 4, "exchange": 2, "tile": 3, "cached": 2, "hard": 2, "evenness": 3}
    pairs = {pair for case in CASES for pair in itertools.combinations(sorted(choices(case).items()), 2)}
    for (first, firsts), (second, seconds) in itertools.combinations(sorted(occurring.items()), 2):
        for one, other in itertools.product(firsts, seconds):
            if (one, second) != (1, "evenness") and (other, first) != (1, "evenness"):
                assert ((first, one), (second, other)) in pairs


def test_further_cases_hold_every_choice() -> None:
    for name in ("workers", "exchange", "tile", "cached", "hard"):
        assert {choices(case)[name] for case in FURTHER} == {choices(case)[name] for case in CASES}
    assert any(0 in case.rows for case in FURTHER)


KINDS = {
    "fused softmax": "infonce",
    "fused sigmoid": "siglip",
    "one pass over tiles": "dcl",
    "several comparisons": "ntxent",
    "several passes": "ascl",
    "mined negatives": "mined-negatives",
    "own scores": "colbert",
    "constant columns": "moco",
    "per-sample table": "sogclr",
    "moments": "vicreg",
    "made of objectives": "sum",
}
ROWS = {
    "even": [(8,), (4, 4), (3, 3, 3), (2, 2, 2, 2)],
    "uneven": [(9,), (3, 6), (4, 2, 3), (1, 3, 2, 3)],
    "one empty": [(0, 8), (4, 0, 5), (3, 0, 2, 4)],
}


@pytest.mark.parametrize("evenness", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_of_each_kind_through_all_cases(pool: Pool, kind: str, evenness: str) -> None:
    cases = []
    for rows, exchange, tile, cached in itertools.product(ROWS[evenness], ["gather", "ring"], [256, 5], [False, True]):
        hard = (len(rows) + (exchange == "ring") + (tile == 5) + cached) % 2 == 1  # with each pair of the other choices
        cases.append((Case(rows, exchange, tile, cached, hard), 0))
    compare(pool, KINDS[kind], cases)


@functools.cache
def formula(name: str, settings: int, rows: int, hard: bool) -> Answer:
    """What every case of as many samples is compared with."""
    return by_formula(name, REFERENCES[name].settings[settings], Case((rows,), "gather", 256, False, hard))


def compare(pool: Pool, name: str, cases: Sequence[tuple[Case, int]]) -> None:
    """Each worker's losses, gradients and state in each case, with settings by number, against the formula's."""
    reference = REFERENCES[name]
    jobs = [(len(case.rows), (name, reference.settings[number], case)) for case, number in cases]
    with contextlib.closing(pool.run_all(on_worker, jobs)) as answers:
        for (case, number), found in zip(cases, answers, strict=True):
            expected = formula(name, number, sum(case.rows), case.hard)
            where = case, reference.settings[number]
            for answer in found:
                for step in range(STEPS):
                    assert error(answer.losses[step], expected.losses[step]) <= reference.tolerance, where
                    assert answer.gradients[step].keys() == expected.gradients[step].keys()
                    for key, slope in expected.gradients[step].items():
                        assert error(answer.gradients[step][key], slope) <= reference.tolerance, (where, step, key)
                for key, value in expected.state.items():
                    assert error(answer.state[key].double(), value.double()) <= reference.tolerance, (where, key)
