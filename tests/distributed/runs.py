"""Training runs on the pool of workers, and the figures that they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl.config import parse_config
from cl.engine.collectives import Workers
from cl.training.config import TrainConfig
from cl.training.loop import train_worker
from cl.training.metrics import read_metrics
from tests.distributed.pool import Pool
from tests.training_corpus import TINY_MODEL


def run_worker(workers: Workers, fields: dict[str, Any]) -> int:
    """One worker of a run; returns its number of steps."""
    Path(fields["out"]).mkdir(parents=True, exist_ok=True)
    return train_worker(parse_config(TrainConfig, fields, "test"), workers=workers).steps


def losses(pool: Pool, size: int, fields: dict[str, Any]) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, logit scale) of each step."""
    assert pool.run(run_worker, size, fields) == [fields["steps"]] * size
    records = read_metrics(Path(fields["out"]) / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, fields["steps"] + 1))
    return [(record["loss"], record["grad_norm"], record["logit_scale"]) for record in records]


def self_distilled() -> dict[str, Any]:
    """Pictures against captions, and a strongly augmented view against an average's view of the weak one."""
    views = {**TINY_MODEL["views"], "strong": {"tower": "image", "of": "image", "augment": "simclr"}}
    terms = {
        "clip": {"objective": {"name": "infonce", "views": ["image", "text"]}},
        "self": {"objective": {"name": "infonce", "views": ["strong", "image_ema"]}},
    }
    return {
        "model": TINY_MODEL | {"views": views},
        "objective": {"name": "sum", "terms": terms},
        "teachers": {"ema": {"kind": "ema", "views": ["image"], "momentum": 0.8}},
    }


def all_figures(pool: Pool, size: int, fields: dict[str, Any]) -> list[list[float]]:
    """Loss, gradient norm and the loss of each term, of each step."""
    assert pool.run(run_worker, size, fields) == [fields["steps"]] * size
    names = ["loss", "grad_norm", "clip/loss", "self/loss"]
    return [[record[name] for name in names] for record in read_metrics(Path(fields["out"]) / "metrics.jsonl")]
