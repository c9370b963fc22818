"""A training config is refused before anything starts, with the field and what is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cl.config import load_config, parse_config, shipped_configs
from cl.errors import ConfigError
from cl.training.config import TrainConfig
from tests.training_corpus import TINY_MODEL, tiny_run


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": None}, "exactly one of steps, samples and epochs"),
        ({"epochs": 3}, "steps and epochs are"),
        ({"corpus": None}, "exactly one of corpus"),
        ({"corpora": ["a", "b"]}, "exactly one of corpus"),
        ({"batch_size": 2, "workers": {"count": 3}}, "batch_size (2) must be at least workers.count (3)"),
        ({"precision": "fp16"}, "'precision' has the value 'fp16'"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "betas must lie in [0, 1)"),
        ({"optimizer": {"lrr": 1}}, "Did you mean 'lr'?"),
        ({"out": "s3://bucket/run"}, "out must be a local or shared folder"),
        ({"model": "tiny-clop"}, "tiny-clip"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, tiny_run("corpus", Path("out")) | change, "test")
    assert words in str(caught.value)


@pytest.mark.parametrize(("length", "steps"), [({"steps": 7}, 7), ({"samples": 33}, 3), ({"epochs": 2}, 12)])
def test_length_of_a_run(length: dict[str, int], steps: int) -> None:
    fields = tiny_run("corpus", Path("out")) | {"steps": None} | length
    assert parse_config(TrainConfig, fields, "test").total_steps(steps_per_epoch=6) == steps


def test_model_by_name_takes_overrides() -> None:
    fields = tiny_run("corpus", Path("out")) | {"model": {"extends": "tiny-clip", "embed_dim": 48}}
    model = parse_config(TrainConfig, fields, "test").model
    assert model.embed_dim == 48
    assert set(model.towers) == {"image", "text"}


@pytest.mark.parametrize("name", [*shipped_configs("train"), *shipped_configs("recipes")])
def test_shipped_configs_load(name: str) -> None:
    config = load_config(TrainConfig, "train", name)
    assert parse_config(TrainConfig, config.model_dump(mode="json"), name) == config


def test_resolved_config_keeps_the_model() -> None:
    config = parse_config(TrainConfig, tiny_run("corpus", Path("out")), "test")
    assert config.model_dump(mode="json")["model"]["embed_dim"] == TINY_MODEL["embed_dim"]
