"""Metrics of a run: one JSON object a record in `metrics.jsonl`, and the same numbers for TensorBoard.

A run that goes on from a checkpoint first drops the records after the checkpoint's step, so that each step is in the
file once and the file is that of a run that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from cl import storage


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records, in order; a last line that a killed writer left unfinished is not one."""
    return list(_records(path.read_bytes())) if path.exists() else []


def _records(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.split(b"\n")[:-1]:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the records up to and including `step`."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    storage.write_bytes(str(path), b"".join(orjson.dumps(record) + b"\n" for record in kept))


class MetricsWriter:
    """Writes records after `start_step`; one writer (rank 0) a run.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, out: str, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = Path(out) / "metrics.jsonl"
        truncate_metrics(self._path, start_step)
        self._file = open(self._path, "ab")  # noqa: SIM115 - closed by close()
        # TensorBoard shows nothing that earlier writers logged from purge_step on.
        self._board = SummaryWriter(str(Path(out) / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; it is on its way to the disk when this returns."""
        try:
            self._file.write(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
            self._file.flush()
        except OSError as error:
            raise storage.write_error(str(self._path), error) from error
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(f"train/{name}", value, record["step"])

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
