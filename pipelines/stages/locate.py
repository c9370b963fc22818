"""Whether the bytes of every sample are where the corpus says."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from cl import storage
from cl.corpus import Kind
from cl.errors import DataError
from pipelines.stages.base import Output, Rows, RowStage
from pipelines.stages.registry import STAGES


@STAGES.register("locate", "Quarantine samples whose shard ends before their bytes (always run first)")
class Locate(RowStage):
    """Costs one look at the size of each shard. A shard that is not there at all stops the run."""

    kinds: ClassVar[tuple[Kind, ...]] = ("image-text",)
    drops: ClassVar[bool] = True
    broken_reason: ClassVar[str] = "truncated_shard"

    def needs(self, kind: Kind) -> list[str]:
        return ["shard", "offset", "length"]

    def run(self, rows: Rows) -> Output:
        shards = rows.table["shard"].to_pylist()
        sizes = {shard: _size(rows.corpus.shard_url(shard)) for shard in dict.fromkeys(shards)}
        size = np.array([sizes[shard] for shard in shards], np.int64)
        end = rows.table["offset"].to_numpy() + rows.table["length"].to_numpy()
        return Output(
            broken={int(row): f"{end[row] - size[row]} bytes are missing" for row in np.flatnonzero(end > size)}
        )


def _size(url: str) -> int:
    fs, path = storage.open_fs(url)
    try:
        return int(fs.size(path))
    except FileNotFoundError as error:
        raise DataError(f"Shard {url} does not exist, but the corpus points to it.") from error
