"""What a run returns, and what `summary.json` holds."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from cl import storage
from cl.errors import DataError


class TrainResult(BaseModel):
    """The summary of a finished run."""

    out: str
    steps: int  # optimizer steps, those before an interruption included
    samples: int  # positions of the corpora consumed
    samples_per_second: float  # over the whole run
    loss_first: float | None  # of the first and of the last record
    loss_last: float | None
    seconds: float  # of training, without start and work that was lost and done again
    checkpoint: str  # the last one
    workers: int
    precision: str  # what `auto` came to
    resumed_from: int | None = None  # step of the checkpoint that the last start went on from

    def write(self) -> None:
        storage.write_json(_path(self.out), self.model_dump())


def _path(out: str) -> str:
    return str(Path(out) / "summary.json")


def read_result(out: str) -> TrainResult | None:
    """The result of the run in a folder, or None if it has not finished.

    Raises:
        DataError: `summary.json` is not one.
    """
    if not storage.exists(_path(out)):
        return None
    try:
        return TrainResult.model_validate(storage.read_json(_path(out)))
    except ValidationError as error:
        raise DataError(f"{_path(out)} is not the summary of a training run.") from error
