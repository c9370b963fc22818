"""How well the two sides of a pair agree: the cosine of their embeddings.

CLIPScore (Hessel et al. 2021) without its factor and floor. LAION and DataComp filter by it: either every pair below a
threshold goes, or exactly the best n stay, ties by id.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import VIEWS, Kind
from pipelines.stages.base import Output, Rows, reasons
from pipelines.stages.keyed import Streams
from pipelines.stages.registry import STAGES
from pipelines.stages.selection import Groups, Keys, Selection, ascending, keys_of, no_keys, selected


@STAGES.register(
    "image_text_score",
    "Cosine of a pair's two embeddings; drop those below a threshold or outside the best fraction",
    "CLIPScore: A Reference-free Evaluation Metric for Image Captioning",
)
class ImageTextScore(Selection):
    """Writes `image_text_score`, for text pairs `pair_score`. A task holds 32 bytes a row of its partition."""

    version: ClassVar[int] = 2
    drops: ClassVar[bool] = True

    min_score: float | None = Field(None, ge=-1, le=1, description="cosine; pairs below are dropped")
    top_fraction: float | None = Field(None, gt=0, le=1, description="of the pairs (above min_score) that stay")
    columns: tuple[str, str] | None = Field(
        None, description="the two embeddings; None: image_embedding and text_embedding, or those of text pairs"
    )

    @staticmethod
    def column(kind: Kind) -> str:
        return "image_text_score" if kind == "image-text" else "pair_score"

    def needs(self, kind: Kind) -> list[str]:
        return list(self.columns or [f"{view}_embedding" for view in VIEWS[kind]])

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field(self.column(kind), pa.float32())]

    def scores(self, rows: Rows) -> np.ndarray:
        """float32 [n]."""
        first, second = (rows.vectors(column) for column in self.needs(rows.corpus.kind))
        return np.einsum("nd,nd->n", first, second).astype(np.float32)

    def _keys(self, rows: Rows, score: np.ndarray) -> Keys:
        return keys_of(rows, np.zeros(len(rows), np.int64), ascending(-score))

    def _enough(self, score: np.ndarray) -> np.ndarray:
        return np.asarray(score >= (self.min_score if self.min_score is not None else -2))

    def partial(self, rows: Rows, partitions: int) -> Streams:
        if self.top_fraction is None:
            return self.send_keys(no_keys(), partitions)
        score = self.scores(rows)
        return self.send_keys(self._keys(rows, score), partitions, self._enough(score))

    def quotas(self, groups: Groups) -> np.ndarray:
        return np.array([max(round((self.top_fraction or 1.0) * size), 1) for size in groups.size.tolist()], np.int64)

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        score = self.scores(rows)
        masks = {}
        if self.min_score is not None:
            masks["score_below_threshold"] = ~self._enough(score)
        if self.top_fraction is not None:
            masks["score_outside_top"] = ~selected(self._keys(rows, score), reduced)
        return Output({self.column(rows.corpus.kind): score}, reasons(len(rows), masks))
