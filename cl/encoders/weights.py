"""Weights to start from: another run's checkpoint, or an open_clip model in safetensors."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cl import storage
from cl.encoders.model import EncoderModel
from cl.errors import ConfigError

WEIGHTS_FILE = "model.safetensors"


def read_tensors(file: Path | str) -> dict[str, Tensor]:
    """All tensors of a safetensors file on the CPU.

    Raises:
        ConfigError: missing, or another format (a pickle is never opened).
    """
    try:
        return load_file(str(file))
    except FileNotFoundError as error:
        raise ConfigError(f"{file} does not exist.") from error
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is not a safetensors file: {error}.") from error


def load_weights(model: EncoderModel, source: str) -> None:
    """Fill a model from a Clew checkpoint or run folder, or from an open_clip .safetensors file or its folder.

    Raises:
        ConfigError: nothing there, or weights that do not fit.
    """
    from cl.encoders.checkpoint import find_checkpoint, is_clew_checkpoint, localised

    if not storage.exists(source):
        raise ConfigError(f"weights {source} do not exist.")
    with localised(source) as path:
        if path.is_dir() and is_clew_checkpoint(path):
            load_state(model, read_tensors(find_checkpoint(path) / WEIGHTS_FILE), source)
            return
        tensors = read_tensors(path / "open_clip_model.safetensors" if path.is_dir() else path)
    if any(name.startswith("towers.") for name in tensors):
        load_state(model, tensors, source)
        return
    for name, tower in model.towers.items():
        if not hasattr(tower, "load_external"):
            raise ConfigError(f"The tower {name!r} cannot read weights of another project from {source}.")
        tower.load_external(tensors, source)  # type: ignore[operator]


def load_state(model: EncoderModel, tensors: dict[str, Tensor], where: str) -> None:
    """Fill a model from tensors of Clew's own names; all must be there and fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigError(f"{where} does not fit this model: {' '.join(str(error).split())[:300]}") from error
