"""Checkpoints are whole or not there: damage is noticed, and the newest whole one is used."""

from __future__ import annotations

import errno
import logging
import os
import pickle
from pathlib import Path

import fsspec
import pytest
import torch

from cl.config import dump_config, parse_config
from cl.encoders import EncoderModel, ModelConfig, build_model, load_checkpoint_model
from cl.errors import DataError
from cl.training import checkpoint as module
from cl.training.checkpoint import (
    SavedModel,
    list_steps,
    newest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from tests.training_corpus import TINY_MODEL

MODEL_CONFIG = parse_config(ModelConfig, TINY_MODEL, "test")


@pytest.fixture(scope="module")
def model() -> EncoderModel:
    return build_model(MODEL_CONFIG)


def save(root: str | Path, step: int, model: EncoderModel) -> str:
    trainer = {"step": step, "seconds": 1.5, "optimizer": {"state": {0: {"exp_avg": torch.arange(3.0)}}}}
    config = "model:\n" + "".join(f"  {line}\n" for line in dump_config(MODEL_CONFIG).splitlines())
    saved = SavedModel(model, MODEL_CONFIG, model.state_dict())
    return save_checkpoint(str(root), step, saved, trainer, config)


def test_round_trip(tmp_path: Path, model: EncoderModel) -> None:
    url = save(tmp_path, 7, model)
    found = newest_checkpoint(str(tmp_path))
    assert found is not None
    assert (found.step, found.url) == (7, url)
    state = found.model_state()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(found.trainer_state()["optimizer"]["state"][0]["exp_avg"], torch.arange(3.0))
    assert (
        load_checkpoint_model(url)[2].embed_dim == MODEL_CONFIG.embed_dim
    )  # a checkpoint is a model that stands alone
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


@pytest.mark.parametrize("damage", ["bit", "cut", "missing", "manifest", "no manifest", "wrong step", "escape"])
def test_damaged_is_passed_over_with_a_warning(
    tmp_path: Path, model: EncoderModel, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10, model)
    newest = Path(save(tmp_path, 20, model))
    weights, manifest = newest / "model.safetensors", newest / "manifest.json"
    if damage == "bit":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif damage == "cut":
        os.truncate(newest / "trainer.pt", 100)
    elif damage == "missing":
        (newest / "config.yaml").unlink()
    elif damage == "manifest":
        os.truncate(manifest, manifest.stat().st_size // 2)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "wrong step":
        manifest.write_text(manifest.read_text().replace('"step": 20', '"step": 30'))
    else:
        manifest.write_text(manifest.read_text().replace('"config.yaml"', '"../../config.yaml"'))
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(str(tmp_path))
    assert found is not None
    assert found.step == 10
    assert "step-00000020" in caplog.text


def test_no_whole_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(str(tmp_path / "nothing")) is None
    (tmp_path / "step-00000003").mkdir()
    assert newest_checkpoint(str(tmp_path)) is None


def test_write_that_breaks_off_leaves_nothing(
    tmp_path: Path, model: EncoderModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle of a write: one sentence, the older checkpoint stays, no half folder."""
    save(tmp_path, 10, model)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match="no space is left on the disk"):
        save(tmp_path, 20, model)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


class _Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {self.file}",))


def test_code_in_trainer_state_is_not_run(tmp_path: Path, model: EncoderModel) -> None:
    url = Path(save(tmp_path, 1, model))
    torch.save({"step": _Evil(tmp_path / "evil")}, url / "trainer.pt")
    manifest = module.orjson.loads((url / "manifest.json").read_bytes())
    manifest["files"]["trainer.pt"] = module._fingerprint(url / "trainer.pt")
    (url / "manifest.json").write_bytes(module.orjson.dumps(manifest))
    with pytest.raises(pickle.UnpicklingError):
        open_checkpoint(str(tmp_path), 1).trainer_state()
    assert not (tmp_path / "evil").exists()


def test_keeps_the_last_and_sweeps_what_killed_writers_left(tmp_path: Path, model: EncoderModel) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, model)
    (tmp_path / ".tmp-killed").mkdir()
    prune_checkpoints(str(tmp_path), keep_last=2, newest=20)
    assert list_steps(str(tmp_path)) == [20, 15]
    assert not (tmp_path / ".tmp-killed").exists()


def test_same_step_again_replaces(tmp_path: Path, model: EncoderModel) -> None:
    url = Path(save(tmp_path, 5, model))
    (url / "manifest.json").write_text("{}")
    save(tmp_path, 5, model)
    open_checkpoint(str(tmp_path), 5).verify()


def test_on_an_object_store(model: EncoderModel) -> None:
    root = "memory://bucket/run/checkpoints"
    for step in (1, 2, 3):
        save(root, step, model)
        prune_checkpoints(root, keep_last=2, newest=step)
    assert list_steps(root) == [3, 2]
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/bucket/run/checkpoints/step-00000003/model.safetensors", b"damaged")
    found = newest_checkpoint(root)
    assert found is not None
    assert found.step == 2
    assert found.trainer_state()["step"] == 2
