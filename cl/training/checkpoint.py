"""Checkpoints: folders that are either whole or not there.

    CHECKPOINTS/step-00000100/
      model.safetensors, towers/   the model; `cl.encoders.load_checkpoint_model` needs nothing else of the run
      config.yaml                  the run's config
      teachers/NAME/               a teacher that follows the model: a checkpoint that stands alone as well
      tables/                      what the objective keeps for each sample, a file a worker (`cl.memory.shards`)
      trainer.pt                   optimizer, objective, step, data position; read with weights_only=True
      manifest.json                size and blake3 of each file, written last

Files are made in a local temporary folder. On a local disk the folder is then renamed into place; on an object store
the manifest is put last. Either way a folder without a manifest that fits its files is not a checkpoint. Each file's
hash is checked when it is read, and the newest checkpoint that passes is used.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson
import torch
from blake3 import blake3
from safetensors.torch import load as load_safetensors

from cl import storage
from cl.encoders import EncoderModel, ModelConfig, save_model
from cl.errors import ClewError, DataError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
TRAINER = "trainer.pt"
TEACHERS = "teachers"
TABLES = "tables"
FORMAT = "clew-checkpoint"
_PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were all there, with the right sizes and hashes, when it was found."""

    url: str
    step: int
    files: dict[str, dict[str, Any]]  # name -> {"bytes": int, "blake3": hex}

    def read(self, name: str) -> bytes:
        """The bytes of one file, checked against the manifest."""
        fs, path = storage.open_fs(storage.join(self.url, name))
        try:
            data = fs.cat_file(path)
        except OSError as error:
            raise DataError(f"{self.url}: file {name} cannot be read: {error}.") from error
        said = self.files[name]
        if len(data) != said["bytes"] or blake3(data).hexdigest() != said["blake3"]:
            raise DataError(f"{self.url}: file {name} is damaged: its bytes are not those of the manifest.")
        return data

    def model_state(self) -> dict[str, torch.Tensor]:
        """The model's tensors by name, on the CPU."""
        return load_safetensors(self.read(MODEL))

    def teacher_state(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a teacher by name, on the CPU.

        Raises:
            DataError: the checkpoint has no such teacher.
        """
        file = f"{TEACHERS}/{name}/{MODEL}"
        if file not in self.files:
            raise DataError(f"{self.url} holds no teacher {name!r}.")
        return load_safetensors(self.read(file))

    def trainer_state(self) -> dict[str, Any]:
        """Everything but the model; tensors on the CPU."""
        return torch.load(io.BytesIO(self.read(TRAINER)), map_location="cpu", weights_only=True)

    def verify(self) -> None:
        """Read every file once and compare it with the manifest.

        Raises:
            DataError: a file is missing or damaged.
        """
        for name in self.files:
            self.read(name)


class SavedModel(NamedTuple):
    """A model to keep: its towers, without the wrapper of several workers, what they are built from, whole tensors."""

    model: EncoderModel
    config: ModelConfig
    tensors: Mapping[str, torch.Tensor]

    def write(self, folder: Path, write_config: bool = True) -> None:
        """Into a local folder, as `cl.encoders.load_checkpoint_model` reads it."""
        save_model(self.model, self.config, folder, write_config, self.tensors)


def save_checkpoint(
    root: str,
    step: int,
    model: SavedModel,
    trainer: dict[str, Any],
    config_yaml: str,
    teachers: Mapping[str, SavedModel] = MappingProxyType({}),
    tables: Sequence[str] = (),
) -> str:
    """Write a checkpoint and return its URL; one that is there for the same step is replaced.

    Args:
        root: folder of the run's checkpoints.
        step: optimizer steps done.
        model: the towers.
        trainer: what `Checkpoint.trainer_state` gives back.
        config_yaml: the run's config.
        teachers: further models by name.
        tables: files that the workers have written below `tables_folder(root, step)`; they are moved.

    Raises:
        DataError: the place cannot be written or the disk is full.
    """
    url = storage.join(root, f"{_PREFIX}{step:08d}")
    with _staging(root) as folder:
        model.write(folder, write_config=False)
        for name, teacher in teachers.items():
            teacher.write(folder / TEACHERS / name)
        try:
            _fetch_tables(tables_folder(root, step), tables, folder / TABLES)
            (folder / "config.yaml").write_text(config_yaml, encoding="utf-8")
            torch.save(trainer, folder / TRAINER)
            names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            files = {name: _fingerprint(folder / name) for name in names}
            manifest = {"format": FORMAT, "version": 1, "step": step, "files": files}
            (folder / MANIFEST).write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")
            _publish(folder, url, names)
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            raise _write_error(url, error) from error
    return url


def tables_folder(root: str, step: int) -> str:
    """Where all workers write their files of per-sample tables before the checkpoint takes them in."""
    return storage.join(root, f"{storage.TEMPORARY}{TABLES}-{step:08d}")


def _fetch_tables(source: str, names: Sequence[str], folder: Path) -> None:
    if not names:
        return
    fs, path = storage.open_fs(source)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(f"{path}/{name}", str(folder / name))
    fs.rm(path, recursive=True)


def _write_error(url: str, error: OSError | RuntimeError) -> DataError:
    if isinstance(error, OSError):
        return storage.write_error(url, error)
    return DataError(f"{url} cannot be written: {str(error).splitlines()[0]}.")


@contextlib.contextmanager
def _staging(root: str) -> Iterator[Path]:
    """A local temporary folder, beside the checkpoints if they are local."""
    if storage.is_local(root):
        parent = storage.open_fs(root)[1]
        try:
            os.makedirs(parent, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=storage.TEMPORARY, dir=parent))
            folder.chmod(0o755)
        except OSError as error:
            raise storage.write_error(root, error) from error
    else:
        folder = Path(tempfile.mkdtemp(prefix="clew-checkpoint-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, Any]:
    hasher = blake3()
    hasher.update_mmap(path)
    return {"bytes": path.stat().st_size, "blake3": hasher.hexdigest()}


def _publish(folder: Path, url: str, names: list[str]) -> None:
    fs, target = storage.open_fs(url)
    if storage.is_local(url):
        for path in folder.rglob("*"):
            if path.is_file():
                _sync(path)
        if os.path.isdir(target):  # left by a run that was rolled back
            _delete(url)
        os.rename(folder, target)
        _sync(Path(target).parent)
        return
    if fs.exists(target):
        _delete(url)
    for name in [*names, MANIFEST]:
        storage.write_bytes(storage.join(url, name), (folder / name).read_bytes())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(url: str) -> None:
    """Delete a checkpoint, its manifest first, so that what is half deleted is not taken for a checkpoint."""
    fs, path = storage.open_fs(url)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(f"{path}/{MANIFEST}")
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def list_steps(root: str) -> list[int]:
    """Steps of the folders that look like checkpoints, whole or not, newest first."""
    fs, path = storage.open_fs(root)
    try:
        names = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=True)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbers = [name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX)]
    return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)


def open_checkpoint(root: str, step: int) -> Checkpoint:
    """Read a checkpoint's manifest.

    Raises:
        DataError: there is none, or it is not one.
    """
    url = storage.join(root, f"{_PREFIX}{step:08d}")
    data = storage.read_json(storage.join(url, MANIFEST))
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != 1:
        raise DataError(f"{url}/{MANIFEST} is not the manifest of a Clew checkpoint of version 1.")
    files = data.get("files")
    if not isinstance(files, dict) or data.get("step") != step or not {MODEL, TRAINER} <= files.keys():
        raise DataError(f"{url}/{MANIFEST} does not list the files of step {step}.")
    if any(os.path.isabs(name) or ".." in Path(name).parts for name in files):
        raise DataError(f"{url}/{MANIFEST} lists a file outside of the checkpoint.")
    return Checkpoint(url, step, files)


def newest_checkpoint(root: str) -> Checkpoint | None:
    """The newest checkpoint whose files are whole, or None; damaged ones are passed over with a warning."""
    for step in list_steps(root):
        try:
            checkpoint = open_checkpoint(root, step)
            checkpoint.verify()
        except ClewError as error:
            logger.warning("Checkpoint %s%08d is not used: %s", _PREFIX, step, error)
            continue
        return checkpoint
    return None


def prune_checkpoints(root: str, keep_last: int, newest: int) -> None:
    """Delete all but the `keep_last` newest checkpoints up to step `newest`, and what killed writers left."""
    kept = [step for step in list_steps(root) if step <= newest][:keep_last]
    for step in list_steps(root):
        if step < min(kept, default=0):
            _delete(storage.join(root, f"{_PREFIX}{step:08d}"))
    if storage.is_local(root):
        for path in Path(storage.open_fs(root)[1]).glob(f"{storage.TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
