"""The number of workers does not change what is learnt: same global batch, same loss, step by step.

    loss(step k, W workers) = loss(step k, 1 worker)    to 1e-9 in float64 and 1e-3 in float32, over 20 steps

The runs go through epochs whose last batch is short, so that some workers hold fewer samples or none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cl.config import parse_config
from cl.engine.collectives import Workers
from cl.training.config import TrainConfig
from cl.training.metrics import read_metrics
from tests.distributed.pool import Pool
from tests.distributed.runs import all_figures, losses, run_worker, self_distilled
from tests.training_corpus import tiny_run, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    # 82 samples in steps of 16: the last step of an epoch has 2, which leave the last of two workers empty.
    return write_corpus(tmp_path_factory.mktemp("corpus") / "squares", samples=82)


@pytest.mark.parametrize(("precision", "bound"), [("fp64", 1e-9), ("fp32", 1e-3)])
@pytest.mark.parametrize(("size", "exchange"), [(2, "gather"), (3, "gather"), (2, "ring")])
def test_same_loss_for_any_number_of_workers(
    pool: Pool, corpus: str, tmp_path: Path, precision: str, bound: float, size: int, exchange: str
) -> None:
    fields = {"precision": precision, "objective": {"name": "infonce", "exchange": exchange}}
    one = losses(pool, 1, tiny_run(corpus, tmp_path / "one", **fields))
    many = losses(pool, size, tiny_run(corpus, tmp_path / "many", **fields))
    assert one[-1][0] < one[0][0] - 0.3  # it learns, so equal numbers say something
    for alone, shared in zip(one, many, strict=True):
        assert shared == pytest.approx(alone, rel=bound, abs=bound)


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_do_not_change_the_loss(pool: Pool, corpus: str, tmp_path: Path, size: int) -> None:
    """Gradient caching, three samples at a time, also with a worker whose last batch is empty."""
    one = losses(pool, 1, tiny_run(corpus, tmp_path / "one"))
    cached = losses(pool, size, tiny_run(corpus, tmp_path / "cached", micro_batch=3))
    for whole, parts in zip(one, cached, strict=True):
        assert parts == pytest.approx(whole, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("size", "micro_batch"), [(2, None), (3, None), (2, 3)])
def test_views_and_a_following_teacher_are_the_same_for_any_number_of_workers(
    pool: Pool, corpus: str, tmp_path: Path, size: int, micro_batch: int | None
) -> None:
    """One worker's losses, step by step, on more of them and with gradient caching; the averages end alike as well."""
    one = all_figures(pool, 1, tiny_run(corpus, tmp_path / "one", **self_distilled()))
    many = all_figures(pool, size, tiny_run(corpus, tmp_path / "many", **self_distilled(), micro_batch=micro_batch))
    assert one[-1][2] < one[0][2] - 0.1  # it learns, from captions and from its teacher
    assert one[-1][3] < one[0][3] - 0.1
    for alone, shared in zip(one, many, strict=True):
        assert shared == pytest.approx(alone, rel=1e-9, abs=1e-9)
    teachers = [tmp_path / run / "checkpoints" / "step-00000020" / "teachers" / "ema" for run in ("one", "many")]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in teachers)
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9) for name in ours)


def test_a_teacher_on_another_number_of_workers_goes_on(pool: Pool, corpus: str, tmp_path: Path) -> None:
    """10 steps on two workers, then 10 on one, equal 20 on one."""
    fields = self_distilled() | {"schedule": {"kind": "constant"}}
    fields["teachers"]["ema"]["momentum_schedule"] = "constant"
    one = all_figures(pool, 1, tiny_run(corpus, tmp_path / "one", **fields))
    moved = tiny_run(corpus, tmp_path / "moved", **fields)
    assert pool.run(run_worker, 2, moved | {"steps": 10}) == [10, 10]
    for alone, shared in zip(one, all_figures(pool, 1, moved), strict=True):
        assert shared == pytest.approx(alone, rel=1e-9, abs=1e-9)


def test_resume_on_another_number_of_workers(pool: Pool, corpus: str, tmp_path: Path) -> None:
    """10 steps on two workers, then 10 on three, equal 20 on one."""
    one = losses(pool, 1, tiny_run(corpus, tmp_path / "one", schedule={"kind": "constant"}))
    fields = tiny_run(corpus, tmp_path / "moved", schedule={"kind": "constant"})
    assert pool.run(run_worker, 2, fields | {"steps": 10}) == [10, 10]
    moved = losses(pool, 3, fields)
    for alone, shared in zip(one, moved, strict=True):
        assert shared == pytest.approx(alone, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["sogclr", "isogclr"])
def test_numbers_kept_for_each_sample_go_on_with_any_number_of_workers(
    pool: Pool, corpus: str, tmp_path: Path, name: str
) -> None:
    """7 steps on two workers, 6 on one and 7 on three equal 20 on one; an epoch is 6 steps, so samples come again."""
    fields = {"objective": {"name": name}, "schedule": {"kind": "constant"}}
    one = losses_alone(pool, 1, tiny_run(corpus, tmp_path / "one", **fields))
    moved = tiny_run(corpus, tmp_path / "moved", **fields)
    assert pool.run(run_worker, 2, moved | {"steps": 7}) == [7, 7]
    assert pool.run(run_worker, 1, moved | {"steps": 13}) == [13]
    for alone, shared in zip(one, losses_alone(pool, 3, moved), strict=True):
        assert shared == pytest.approx(alone, rel=1e-9, abs=1e-9)
    assert not list((tmp_path / "moved" / "checkpoints").glob(".tmp-*"))


def losses_alone(pool: Pool, size: int, fields: dict[str, Any]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    assert pool.run(run_worker, size, fields) == [fields["steps"]] * size
    records = read_metrics(Path(fields["out"]) / "metrics.jsonl")
    return [(record["loss"], record["grad_norm"]) for record in records]


def test_clipping_uses_the_norm_of_the_averaged_gradient(pool: Pool, corpus: str, tmp_path: Path) -> None:
    """Clipped hard from the first step on, the workers still take the very step of one worker."""
    fields = {"clip_norm": 0.05, "steps": 8, "optimizer": {"lr": 3e-3, "eps": 1.0}}  # a large eps lets the scale show
    one = losses(pool, 1, tiny_run(corpus, tmp_path / "one", **fields))
    two = losses(pool, 2, tiny_run(corpus, tmp_path / "two", **fields))
    assert min(norm for _, norm, _ in one) > 0.05
    for alone, shared in zip(one, two, strict=True):
        assert shared == pytest.approx(alone, rel=1e-9, abs=1e-9)


def _unused_tower_parameter(workers: Workers, fields: dict[str, Any]) -> float:
    """The largest difference between the workers' weights after a run with a parameter that no view uses."""
    import torch

    from cl.encoders import build_model
    from cl.objectives import build_objective
    from cl.training.parallel import wrap
    from cl.training.step import TrainStep

    cfg = parse_config(TrainConfig, fields, "test")
    model = build_model(cfg.model).double()
    model.register_parameter("idle", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    module = wrap(TrainStep(model, build_objective(cfg.objective).double(), workers, "fp64"), torch.device("cpu"))
    from cl.batches.loader import Loader
    from cl.batches.plan import BatchPlan
    from cl.corpus import open_corpus
    from cl.encoders import build_inputs

    plan = BatchPlan([open_corpus(cfg.corpus_paths[0])], 0, 16)
    loader = Loader(plan, workers.rank, workers.size, build_inputs(cfg.model, train=True), steps=3)
    for batch in loader:
        module(batch).loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    total = gradients.clone()
    workers.all_reduce(total)
    return float((total / workers.size - gradients).abs().max())


def test_an_unused_parameter_does_not_stop_the_workers(pool: Pool, corpus: str, tmp_path: Path) -> None:
    assert max(pool.run(_unused_tower_parameter, 2, tiny_run(corpus, tmp_path))) < 1e-14
