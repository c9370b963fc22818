"""Sharded weights, recomputed and compiled blocks give one worker's losses, and each other's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from cl.config import parse_config
from cl.encoders import build_model
from cl.engine.collectives import Workers
from cl.errors import ConfigError
from cl.objectives import build_objective
from cl.training.config import TrainConfig
from cl.training.parallel import blocks_of, prepare
from cl.training.step import TrainStep
from tests.distributed.pool import Pool
from tests.distributed.runs import all_figures, losses, run_worker, self_distilled
from tests.training_corpus import tiny_run, write_corpus

FSDP = {"strategy": "fsdp"}
HSDP = {"strategy": "hsdp", "shard_size": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    # 82 samples in steps of 16: the last step of an epoch has 2, which leave some workers empty.
    return write_corpus(tmp_path_factory.mktemp("corpus") / "squares", samples=82)


@pytest.mark.parametrize(
    ("size", "micro_batch", "parallel"),
    [
        (2, None, FSDP),
        (3, 3, FSDP),
        (4, None, HSDP),
        (4, 3, HSDP | {"reshard": False}),
        (1, None, {"activation_checkpointing": True}),
        (2, 3, FSDP | {"activation_checkpointing": True}),
    ],
    ids=str,
)
def test_the_same_losses_and_teachers(
    pool: Pool, corpus: str, tmp_path: Path, size: int, micro_batch: int | None, parallel: dict[str, Any]
) -> None:
    one = all_figures(pool, 1, tiny_run(corpus, tmp_path / "one", **self_distilled()))
    fields = tiny_run(corpus, tmp_path / "many", **self_distilled(), micro_batch=micro_batch, parallel=parallel)
    for alone, shared in zip(one, all_figures(pool, size, fields), strict=True):
        assert shared == pytest.approx(alone, rel=1e-9, abs=1e-9)
    for part in ("model.safetensors", "teachers/ema/model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / "checkpoints/step-00000020" / part) for run in ("one", "many"))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9) for name in ours)


def test_towers_of_other_libraries_in_shards(pool: Pool, corpus: str, tmp_path: Path) -> None:
    """timm's transformer and a decoder with latent attention, in chunks, with slower rates for deeper blocks."""
    vit = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "reg_tokens": 2}
    llama = {
        "model_type": "llama",
        "vocab_size": 600,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    text = {"family": "huggingface", "config": llama, "pooling": "latent", "latents": 4, "latent_heads": 2}
    towers = {
        "image": {"family": "timm", "name": "vit_tiny_patch16_224", "config": vit},
        "text": {**text, "bidirectional": True, "max_tokens": 16},
    }
    model = {"embed_dim": 16, "towers": towers, "views": {"image": "image", "text": "text"}}
    fields = {"model": model, "steps": 6, "optimizer": {"lr": 3e-3, "layer_decay": 0.8}}
    one = losses(pool, 1, tiny_run(corpus, tmp_path / "one", **fields))
    many = losses(pool, 2, tiny_run(corpus, tmp_path / "many", **fields, micro_batch=3, parallel=FSDP))
    for alone, shared in zip(one, many, strict=True):
        assert shared == pytest.approx(alone, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("optimizer", [{}, {"name": "lamb", "lr": 0.01}, {"name": "lars", "lr": 1.0}], ids=str)
def test_a_run_goes_from_shards_to_replicas_and_back(
    pool: Pool, corpus: str, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    """7 steps in shards on two workers, 6 replicated on three, 7 in replicas of shards on four."""
    fields = {"schedule": {"kind": "constant"}, "optimizer": optimizer}
    one = losses(pool, 1, tiny_run(corpus, tmp_path / "one", **fields))
    moved = tiny_run(corpus, tmp_path / "moved", **fields)
    assert pool.run(run_worker, 2, moved | {"steps": 7, "parallel": FSDP}) == [7, 7]
    assert pool.run(run_worker, 3, moved | {"steps": 13}) == [13] * 3
    for alone, shared in zip(one, losses(pool, 4, moved | {"parallel": HSDP}), strict=True):
        assert shared == pytest.approx(alone, rel=1e-9, abs=1e-9)


def _shares(workers: Workers, fields: dict[str, Any]) -> tuple[float, int]:
    """The part of the towers' weights that lies on this worker, and how many blocks are gathered one by one."""
    cfg = parse_config(TrainConfig, fields, "test")
    step = TrainStep(build_model(cfg.model), build_objective(cfg.objective), workers, "fp32")
    total = sum(p.numel() for p in step.model.parameters())
    prepare(step, cfg.parallel, torch.device("cpu"))
    assert not any(isinstance(p, DTensor) for p in step.objective.parameters())
    mine = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in step.model.parameters())
    return mine / total, sum(type(module).__name__.startswith("FSDP") for module in step.model.modules())


@pytest.mark.parametrize(("size", "parallel", "share"), [(4, FSDP, 0.25), (4, HSDP, 0.5), (1, FSDP, 1.0)], ids=str)
def test_a_worker_holds_its_share(
    pool: Pool, corpus: str, tmp_path: Path, size: int, parallel: dict[str, Any], share: float
) -> None:
    fields = tiny_run(corpus, tmp_path, parallel=parallel)
    model = build_model(parse_config(TrainConfig, fields, "test").model)
    blocks = sum(len(blocks_of(tower)) for tower in model.towers.values())
    assert blocks >= 2
    for found, parts in pool.run(_shares, size, fields):
        assert found == pytest.approx(share, abs=0.03)
        assert parts == (blocks + 1 if size > 1 else 0)


def _refused(workers: Workers, fields: dict[str, Any]) -> str:
    try:
        run_worker(workers, fields)
    except ConfigError as error:
        return str(error)
    return ""


def test_workers_that_cannot_be_divided_are_refused(pool: Pool, corpus: str, tmp_path: Path) -> None:
    fields = tiny_run(corpus, tmp_path, parallel=HSDP)
    assert pool.run(_refused, 3, fields) == ["parallel.shard_size is 2, which does not divide the 3 workers."] * 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_blocks_give_the_same_losses(pool: Pool, corpus: str, tmp_path: Path) -> None:
    one = losses(pool, 1, tiny_run(corpus, tmp_path / "one", steps=3))
    compiled = tiny_run(corpus, tmp_path / "compiled", steps=3, parallel={"compile": True})
    assert pool.run(run_worker, 1, compiled, seconds=600) == [3]
    found = losses(pool, 1, tiny_run(corpus, tmp_path / "compiled", steps=3, parallel={"compile": True}))
    for alone, shared in zip(one, found, strict=True):
        assert shared == pytest.approx(alone, rel=1e-9, abs=1e-9)


def test_blocks_are_the_repeated_parts_of_a_tower() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))  # plain layers
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(3))
            self.inner = nn.ModuleDict({"stage": nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)))})

    tower = Tower()
    stage = tower.inner["stage"]
    assert isinstance(stage, nn.Sequential)
    assert blocks_of(tower) == [*tower.blocks, *stage]
