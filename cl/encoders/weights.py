"""Weights to start from: another run's checkpoint, or an open_clip model in safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

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


def load_weights(model: EncoderModel, source: str | Mapping[str, str]) -> None:
    """Fill a model, or some of its towers.

    Args:
        model: what is filled.
        source: a Clew checkpoint or run folder, or an open_clip .safetensors file or its folder; or tower -> source.

    Raises:
        ConfigError: nothing there, or weights that do not fit.
    """
    if isinstance(source, Mapping):
        for name, each in source.items():
            tensors = _tensors_of(each)
            if _is_clew(tensors):
                prefix = f"towers.{name}."
                own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                if not own:
                    there = ", ".join(sorted({key.split(".")[1] for key in tensors if key.startswith("towers.")}))
                    raise ConfigError(f"{each} has no tower {name!r} to take weights from; it has {there}.")
                _load_tower(model.towers[name], own, f"The tower {name!r} of {each}")
            else:
                _load_external(model, [name], tensors, each)
        return
    tensors = _tensors_of(source)
    if _is_clew(tensors):
        load_state(model, tensors, source)
    else:
        _load_external(model, list(model.towers), tensors, source)


def _tensors_of(source: str) -> dict[str, Tensor]:
    from cl.encoders.checkpoint import find_checkpoint, is_clew_checkpoint, localised

    if not storage.exists(source):
        raise ConfigError(f"weights {source} do not exist.")
    with localised(source) as path:
        if path.is_dir() and is_clew_checkpoint(path):
            return read_tensors(find_checkpoint(path) / WEIGHTS_FILE)
        return read_tensors(path / "open_clip_model.safetensors" if path.is_dir() else path)


def _is_clew(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("towers.") for name in tensors)


def _load_external(model: EncoderModel, names: Sequence[str], tensors: dict[str, Tensor], source: str) -> None:
    for name in names:
        tower = model.towers[name]
        if not hasattr(tower, "load_external"):
            raise ConfigError(f"The tower {name!r} cannot read weights of another project from {source}.")
        tower.load_external(tensors, source)  # type: ignore[operator]


def _load_tower(tower: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    try:
        tower.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigError(f"{where} does not fit that of this model: {' '.join(str(error).split())[:300]}") from error


def load_state(model: EncoderModel, tensors: dict[str, Tensor], where: str) -> None:
    """Fill a model from tensors of Clew's own names; all must be there and fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ConfigError(f"{where} does not fit this model: {' '.join(str(error).split())[:300]}") from error
