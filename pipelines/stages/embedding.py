"""Embeddings of every view by a Clew model, L2-normalised, in float16.

The model is a Clew checkpoint or the folder of a training run. It is loaded once by each actor. Batches are formed in
row order inside a fragment, so results do not depend on the number of actors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import VIEWS, Kind
from cl.errors import ConfigError
from pipelines.heavy import MISSING_BYTES
from pipelines.stages.base import Output, Rows, RowStage, Stage, vector_array
from pipelines.stages.registry import STAGES

IMAGE_COLUMNS = ["shard", "offset", "length"]


class Encoder:
    """A loaded model that embeds the views of rows.

    Args:
        path: Clew checkpoint or training run.
        batch_size: rows of one forward pass.
        precision: fp32, or bf16 autocast.
        threads: of torch, on the CPU; fixed, because sums depend on it in the last bit.
    """

    def __init__(self, path: str, batch_size: int, precision: str, threads: int) -> None:
        import torch

        from cl.encoders import load_checkpoint_model

        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.inputs, self.config = load_checkpoint_model(path)
        self.model.to(self.device)
        self.batch_size, self.precision = batch_size, precision

    def __call__(self, rows: Rows) -> Output:
        views = VIEWS[rows.corpus.kind]
        columns: dict[str, Any] = {}
        broken: dict[int, str] = {}
        for view, modality in views.items():
            parts = list(self._batches(rows, view, modality, broken))
            width = self.config.embed_dim
            values = np.concatenate(parts) if parts else np.zeros((0, width), np.float16)
            columns[f"{view}_embedding"] = vector_array(values)
        return Output(columns, broken=broken)

    def _batches(self, rows: Rows, view: str, modality: str, broken: dict[int, str]) -> Any:
        size = self.batch_size
        if modality == "text":
            yield self.texts(view, rows.texts(view))
            return
        batch: list[bytes] = []
        for row, data in enumerate(rows.images()):
            if data is None:
                broken[row] = MISSING_BYTES
            batch.append(data or b"")
            if len(batch) == size or row == len(rows) - 1:
                failures: dict[int, str] = {}
                pixels = self.inputs.images(view, batch, failures=failures)
                first = row + 1 - len(batch)
                for index, why in failures.items():
                    broken.setdefault(first + index, why)
                yield self._encode(view, pixels)
                batch = []

    def pictures(self, data: list[bytes]) -> np.ndarray:
        """float16 [B, D]: the embeddings of one batch of encoded images that can be decoded."""
        return self._encode("image", self.inputs.images("image", data))

    def texts(self, view: str, texts: Sequence[str]) -> np.ndarray:
        """float16 [n, D], each row of length 1: the embeddings of texts that a view of the model reads."""
        size = self.batch_size
        parts = [
            self._encode(view, self.inputs.texts(view, texts[start : start + size]))
            for start in range(0, len(texts), size)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.config.embed_dim), np.float16)

    def _encode(self, view: str, inputs: Any) -> np.ndarray:
        """float16 [B, D], each row of length 1."""
        import torch

        moved = (
            {name: tensor.to(self.device) for name, tensor in inputs.items()}
            if isinstance(inputs, dict)
            else inputs.to(self.device)
        )
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        with torch.inference_mode(), autocast:
            features = self.model.encode(view, moved).float()
            features = torch.nn.functional.normalize(features, dim=-1)
        return np.asarray(features.cpu().numpy(), np.float16)


@lru_cache(maxsize=8)
def checkpoint_digest(path: str) -> tuple[str, int]:
    """A digest of a checkpoint's weights and config, and the width of its embeddings.

    Raises:
        DataError: there is no finished checkpoint.
    """
    from blake3 import blake3

    from cl import storage
    from cl.encoders.checkpoint import checkpoint_config, find_checkpoint, localised
    from cl.encoders.weights import WEIGHTS_FILE
    from cl.errors import DataError

    if not storage.exists(path):
        raise DataError(f"Checkpoint {path} does not exist.")
    with localised(path) as local:
        folder = find_checkpoint(local)
        config = checkpoint_config(folder)
        digest = blake3()
        digest.update_mmap(folder / WEIGHTS_FILE)
        # Paths in the config change when the folder moves; the towers' own files are digested instead.
        digest.update(repr(sorted(config.readers.items())).encode())
        for file in sorted((folder / "towers").rglob("*")) if (folder / "towers").is_dir() else ():
            if file.is_file():
                digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest(length=16), config.embed_dim


@STAGES.register(
    "embedding",
    "Embeddings of every view by a Clew checkpoint, for scores, clusters and semantic duplicates",
    "Learning Transferable Visual Models From Natural Language Supervision",
)
class Embedding(RowStage):
    """Writes `image_embedding` and `text_embedding`, or `anchor_embedding` and `positive_embedding`."""

    unkeyed: ClassVar[frozenset[str]] = frozenset({"model", "workers", "gpus"})  # the digest stands for the model
    drops: ClassVar[bool] = True  # an image that cannot be decoded is quarantined

    model: str | None = Field(None, description="Clew checkpoint or training run; None: the run's own `model`")
    batch_size: int = Field(64, ge=1, description="rows of one forward pass")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the model")
    workers: int = Field(1, ge=1, description="actors, each with a copy of the model")
    threads: int = Field(1, ge=1, description="CPUs of an actor")
    gpus: float = Field(0.0, ge=0, description="GPUs of an actor")

    def resolve(self, model: str | None, kind: Kind) -> Stage:
        path = self.model or model
        if path is None:
            raise ConfigError("Stage 'embedding' needs a model: give model=PATH of a Clew checkpoint or training run.")
        return self.model_copy(update={"model": path})

    def digest(self) -> str:
        return checkpoint_digest(str(self.model))[0]

    def needs(self, kind: Kind) -> list[str]:
        return [*IMAGE_COLUMNS, "text"] if kind == "image-text" else ["anchor", "positive"]

    def makes(self, kind: Kind) -> list[pa.Field]:
        width = checkpoint_digest(str(self.model))[1] if self.model else 1
        return [pa.field(f"{view}_embedding", pa.list_(pa.float16(), width)) for view in VIEWS[kind]]

    def pool(self) -> tuple[int, float, float]:
        return self.workers, float(self.threads), self.gpus

    def open(self) -> Callable[[Rows], Output]:
        return Encoder(str(self.model), self.batch_size, self.precision, self.threads)
