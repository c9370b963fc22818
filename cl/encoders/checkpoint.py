"""Models on disk: model.safetensors, config.yaml, and what a tower needs beside its weights.

    CHECKPOINT/
      model.safetensors
      config.yaml             holds the model's config under `model`
      towers/NAME/            files of a tower: architecture, tokenizer

A folder that `load_checkpoint_model` reads needs nothing else: no network and no other folder.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cl import storage
from cl.config import dump_config, parse_config, read_yaml
from cl.encoders.config import ModelConfig
from cl.encoders.inputs import Inputs
from cl.encoders.model import EncoderModel, _fresh_model, build_inputs
from cl.encoders.registry import TOWERS
from cl.encoders.weights import WEIGHTS_FILE, load_state, read_tensors
from cl.errors import DataError

CONFIG_FILE = "config.yaml"


def save_model(
    model: EncoderModel,
    cfg: ModelConfig,
    folder: str | Path,
    write_config: bool = True,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model into a local folder.

    Args:
        model: the model itself, not a DDP wrapper.
        cfg: the config it was built from.
        folder: created if need be.
        write_config: False if the caller writes a config.yaml that holds `cfg` under `model`.
        tensors: its state dict, where the model itself holds shards of it; None: the model's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if tensors is None else tensors
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        save_file(tensors, folder / WEIGHTS_FILE)
        for name, tower in cfg.towers.items():
            TOWERS[tower.family].save_files(tower, model.towers[name], folder / "towers" / name)
        if write_config:
            storage.write_bytes(str(folder / CONFIG_FILE), b"model:\n" + _indented(dump_config(cfg)).encode())
    except OSError as error:
        raise storage.write_error(str(folder), error) from error
    except SafetensorError as error:  # a full disk, as safetensors says it
        raise DataError(f"{folder / WEIGHTS_FILE} cannot be written: {error}.") from error


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def is_clew_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint or the folder of a training run."""
    return (folder / CONFIG_FILE).is_file() and ((folder / WEIGHTS_FILE).is_file() or (folder / "checkpoints").is_dir())


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint itself, or the newest finished one of a training run.

    Raises:
        DataError: there is none.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return folder
    steps = sorted((folder / "checkpoints").glob("step-*"), reverse=True)
    for step in steps:
        if (step / "manifest.json").is_file() and (step / WEIGHTS_FILE).is_file():
            return step
    raise DataError(
        f"{folder} holds no finished checkpoint: expected {WEIGHTS_FILE}, or a run with checkpoints/step-*/."
    )


@contextlib.contextmanager
def localised(url: str) -> Iterator[Path]:
    """A local copy of a file or folder for as long as the block lasts; local ones stay where they are."""
    fs, path = storage.open_fs(url)
    if storage.is_local(url):
        yield Path(path)
        return
    temporary = tempfile.mkdtemp(prefix="clew-weights-")
    try:
        target = Path(temporary) / path.rstrip("/").rsplit("/", 1)[-1]
        fs.get(path, str(target), recursive=bool(fs.isdir(path)))
        yield target
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint_model(path: str | Path) -> tuple[EncoderModel, Inputs, ModelConfig]:
    """Read a model from a checkpoint, or from the newest finished checkpoint of a training run.

    Returns:
        the model (CPU, float32, evaluation mode), its inputs without augmentation, and its config.

    Raises:
        DataError: no checkpoint there. ConfigError: its config does not fit this Clew.
    """
    source = str(path)
    if not storage.exists(source):
        raise DataError(f"Checkpoint {source} does not exist.")
    with localised(source) as local:
        folder = find_checkpoint(local)
        cfg = checkpoint_config(folder)
        model = _fresh_model(cfg, 0)
        load_state(model, read_tensors(folder / WEIGHTS_FILE), str(folder))
        return model.eval(), build_inputs(cfg, train=False), cfg


def checkpoint_config(folder: Path) -> ModelConfig:
    """The model config of a checkpoint folder, its towers pointed at the files saved beside the weights."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        file = folder.parent.parent / CONFIG_FILE  # a run's checkpoint: the run has it
    data = read_yaml(file) if file.is_file() else {}
    tree = data.get("model", data if "towers" in data else None)
    if not isinstance(tree, dict):
        raise DataError(f"{folder} has no {CONFIG_FILE} with a model in it.")
    towers = {}
    for name, tower in dict(tree.get("towers", {})).items():
        beside = folder / "towers" / str(name)
        if beside.is_dir():
            tower = TOWERS[tower["family"]].restored(tower, beside)
        towers[name] = tower
    return parse_config(ModelConfig, {**tree, "towers": towers, "weights": None}, str(file))
