"""What recipes are made of gives the same loss for any number of workers: tokens, features, heads, captions, locks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cl.training.metrics import read_metrics
from tests.distributed.pool import Pool
from tests.distributed.runs import run_worker
from tests.training_corpus import TINY_MODEL, tiny_run, write_corpus

STEPS, OPENED = 14, 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    # 82 samples in steps of 16: the last step of an epoch has 2, which leave the last of two workers empty.
    return write_corpus(tmp_path_factory.mktemp("corpus") / "squares", samples=82)


def fields(corpus: str, out: Path, **changes: Any) -> dict[str, Any]:
    own = {"tower": "image", "of": "image", "augment": "simclr", "outputs": ["features"]}
    views = {
        "image": {"tower": "image", "outputs": ["embedding", "tokens"]},
        "text": {"tower": "text", "outputs": ["embedding", "tokens"]},
        "image_1": own,
        "image_2": own,
    }
    words = {"name": "captioning", "vocabulary": 600, "layers": 1, "heads": 2, "rows": 3}
    pair = ["image_1_features", "image_2_features"]
    heads = {"name": "projected", "views": pair, "projector": [12, 8], "objective": {"name": "ntxent"}}
    terms = {
        "clip": {"objective": {"name": "infonce", "views": ["image", "text"]}},
        "caption": {"objective": words},
        "self": {"objective": {**heads, "dimensions": 16}},
    }
    lock = {"trained_layers": {"start": 1, "end": 3, "shape": "step", "finish": OPENED / STEPS}}
    run = {
        "model": TINY_MODEL | {"views": views},
        "objective": {"name": "sum", "terms": terms},
        "locked": {"image": lock},
        "steps": STEPS,
        "schedule": {"kind": "constant"},
        **changes,
    }
    return tiny_run(corpus, out, **run)


def figures(pool: Pool, size: int, run: dict[str, Any]) -> list[list[float]]:
    """Loss, gradient norm and the loss of each term, of each step."""
    assert pool.run(run_worker, size, run) == [run["steps"]] * size
    names = ["loss", "grad_norm", "clip/loss", "caption/loss", "self/loss"]
    return [[record[name] for name in names] for record in read_metrics(Path(run["out"]) / "metrics.jsonl")]


@pytest.mark.slow
def test_the_same_for_any_number_of_workers(pool: Pool, corpus: str, tmp_path: Path) -> None:
    """One worker; two, with and without gradient caching; and 5 steps on two, then the rest on one."""
    one = figures(pool, 1, fields(corpus, tmp_path / "one"))
    assert one[-1][3] < one[0][3] - 0.1
    locked = figures(pool, 1, fields(corpus, tmp_path / "locked", locked={"image": {"trained_layers": 1}}))
    assert locked[:OPENED] == one[:OPENED]
    assert locked[OPENED][1] != one[OPENED][1]  # more of the tower has a gradient
    for name, micro_batch in (("two", None), ("cached", 3)):
        two = figures(pool, 2, fields(corpus, tmp_path / name, micro_batch=micro_batch))
        for alone, shared in zip(one, two, strict=True):
            assert shared == pytest.approx(alone, rel=1e-9, abs=1e-9)
    moved = fields(corpus, tmp_path / "moved")
    # The schedule of a lock is of the whole run, so it is cut and not planned shorter.
    cut = moved | {"callbacks": [{"name": "stop_at_loss", "loss": 1e9}]}
    assert pool.run(run_worker, 2, cut)[0] < STEPS
    for alone, shared in zip(one, figures(pool, 1, moved), strict=True):
        assert shared == pytest.approx(alone, rel=1e-9, abs=1e-9)
