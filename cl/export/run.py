"""`clew export`: a checkpoint into a folder that another project loads.

    open_clip              open_clip.create_model_and_transforms("local-dir:FOLDER")
    huggingface            transformers.AutoModel.from_pretrained(FOLDER)
    sentence-transformers  sentence_transformers.SentenceTransformer(FOLDER)

A folder is made whole under another name and then renamed; no format needs the other project to be installed.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cl import storage
from cl.encoders import EncoderModel, Inputs, ModelConfig
from cl.encoders.checkpoint import find_checkpoint, load_checkpoint_model, localised
from cl.errors import ConfigError, DataError

FORMATS = {
    "open_clip": "cl.export.open_clip",
    "huggingface": "cl.export.huggingface",
    "sentence-transformers": "cl.export.sentence_transformers",
}


@dataclass(frozen=True)
class Trained:
    """What an export is made of.

    Attributes:
        model, inputs, config: as `load_checkpoint_model` gives them.
        objective: tensors of the objective by name, such as the temperature; empty where a checkpoint has none.
    """

    model: EncoderModel
    inputs: Inputs
    config: ModelConfig
    objective: Mapping[str, Tensor]


@dataclass(frozen=True)
class ExportResult:
    """What was written, and the line of Python that loads it."""

    out: str
    format: str
    files: list[str]
    load: str


def export(checkpoint: str, form: str, out: str) -> ExportResult:
    """Write a checkpoint (or the newest of a run) in another project's format.

    Args:
        checkpoint: folder or URL of a Clew checkpoint or run.
        form: a key of `FORMATS`.
        out: local folder that is made; it must not be there yet, or be empty.

    Raises:
        ConfigError: a format that there is not, or that has no place for such a model.
        DataError: no checkpoint, or a folder that cannot be written.
    """
    if form not in FORMATS:
        raise ConfigError(f"There is no format {form!r} to export to: choose from {', '.join(FORMATS)}.")
    if "://" in out:
        raise ConfigError(f"out must be a local folder, not {out}.")
    target = Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{out} exists already and is not an empty folder.")
    write: Callable[[Trained, Path], str] = importlib.import_module(FORMATS[form]).write
    if not storage.exists(checkpoint):
        raise DataError(f"Checkpoint {checkpoint} does not exist.")
    with localised(checkpoint) as local:
        folder = find_checkpoint(local)
        trained = Trained(*load_checkpoint_model(folder), _objective(folder))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=storage.TEMPORARY, dir=target.parent))
        try:
            made.chmod(0o755)
            load = write(trained, made)
            files = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
            os.replace(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise storage.write_error(out, error) from error
    return ExportResult(out, form, files, load.format(out))


def _objective(folder: Path) -> Mapping[str, Tensor]:
    file = folder / "trainer.pt"
    if not file.is_file():
        return {}
    return torch.load(file, map_location="cpu", weights_only=True)["objective"]
