"""The shape of embeddings while training, against the papers' formulas, for any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.training.geometry import BINS, effective_rank, measure_geometry
from cl.training.metrics import read_metrics
from tests.distributed.pool import Pool
from tests.distributed.runs import run_worker
from tests.training_corpus import tiny_run, write_corpus

COUNT, SAMPLES = 20, 14


def batch() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = {name: normalize(torch.randn(COUNT, 6, generator=generator), dim=1) for name in ("image", "text")}
    weight = torch.ones(COUNT)
    weight[[3, 17]] = 0
    views["image"][3] = torch.nan
    content = torch.stack([torch.arange(COUNT), torch.arange(COUNT) // 2], 1)
    return views, weight, content


def on_worker(workers: Workers, rows: tuple[int, ...]) -> dict[str, Any]:
    start = sum(rows[: workers.rank])
    mine = slice(start, start + rows[workers.rank])
    views, weight, content = batch()
    return measure_geometry({n: v[mine] for n, v in views.items()}, weight[mine], content[mine], workers, SAMPLES)


def by_formula() -> dict[str, Any]:
    views, weight, content = batch()
    kept = [row for row in range(SAMPLES) if weight[row] > 0]
    a, b = (views[name][kept].double().numpy() for name in ("image", "text"))
    found: dict[str, Any] = {"alignment": np.mean([((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)])}
    for name, rows in (("image", a), ("text", b)):
        pairs = [((x - y) ** 2).sum() for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        found[f"uniformity/{name}"] = np.log(np.mean(np.exp(-2 * np.array(pairs))))
        share = np.linalg.svd(rows, compute_uv=False)
        share = share / share.sum()
        found[f"effective_rank/{name}"] = np.exp(-(share * np.log(share)).sum())
    known = content[kept].numpy()
    positive = [x @ y for x, y in zip(a, b, strict=True)]
    negative = [a[i] @ b[j] for i in range(len(a)) for j in range(len(a)) if not (known[i] == known[j]).any()]
    for name, scores in (("positive", positive), ("negative", negative)):
        found[f"score/{name}_mean"], found[f"score/{name}_deviation"] = np.mean(scores), np.std(scores)
    found["counts"] = [np.histogram(scores, BINS, (-1, 1))[0].tolist() for scores in (positive, negative)]
    return found


@pytest.mark.parametrize("rows", [(20,), (10, 10), (0, 15, 5), (3, 4, 12, 1)], ids=str)
def test_numbers_of_the_first_samples_by_formula(pool: Pool, rows: tuple[int, ...]) -> None:
    expected = by_formula()
    counts = expected.pop("counts")
    for found in pool.run(on_worker, len(rows), rows):
        histogram = found.pop("score_histogram")
        assert [histogram["positive"], histogram["negative"]] == counts
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_effective_rank_of_what_is_known() -> None:
    assert effective_rank(torch.ones(5, 3, dtype=torch.float64)) == pytest.approx(1)
    assert effective_rank(torch.eye(4, dtype=torch.float64)) == pytest.approx(4)


def test_a_batch_without_two_samples_has_no_shape() -> None:
    views, _, content = batch()
    assert measure_geometry(views, torch.zeros(COUNT), content, Workers(), SAMPLES) == {}


def test_a_run_records_it_at_its_steps(pool: Pool, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    records = {}
    for size in (1, 2):
        out = tmp_path / f"run-{size}"
        more = {"log_every": 100, "geometry": {"every_steps": 2, "samples": 8}, "steps": 5}
        pool.run(run_worker, size, tiny_run(corpus, out) | more)
        records[size] = {record["step"]: record for record in read_metrics(out / "metrics.jsonl")}
        assert [step for step, record in records[size].items() if "alignment" in record] == [2, 4]
        assert list(records[size]) == [1, 2, 4, 5]
    for name in ("alignment", "uniformity/image", "effective_rank/text", "score/negative_mean"):
        assert records[2][4][name] == pytest.approx(records[1][4][name], rel=1e-4)
    assert records[2][4]["score_histogram"].keys() == {"positive", "negative"}
