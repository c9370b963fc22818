"""How well the two sides of a pair agree: the cosine of their embeddings.

CLIPScore (Hessel et al. 2021) without its factor and floor. LAION and DataComp filter by it: either every pair below a
threshold goes, or exactly the best n stay, ties by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import VIEWS, Kind
from pipelines.keyed import id_words
from pipelines.stages.base import Context, GlobalStage, Output, Rows, reasons
from pipelines.stages.registry import STAGES

PARTIAL = pa.schema([("score", pa.float32()), ("id0", pa.uint64()), ("id1", pa.uint64())])


@STAGES.register(
    "image_text_score",
    "Cosine of a pair's two embeddings; drop those below a threshold or outside the best fraction",
    "CLIPScore: A Reference-free Evaluation Metric for Image Captioning",
)
class ImageTextScore(GlobalStage):
    """Writes `image_text_score`, for text pairs `pair_score`. The reduction holds 20 bytes a living row."""

    drops: ClassVar[bool] = True

    min_score: float | None = Field(None, ge=-1, le=1, description="cosine; pairs below are dropped")
    top_fraction: float | None = Field(None, gt=0, le=1, description="of the pairs (above min_score) that stay")

    @staticmethod
    def column(kind: Kind) -> str:
        return "image_text_score" if kind == "image-text" else "pair_score"

    def needs(self, kind: Kind) -> list[str]:
        return [f"{view}_embedding" for view in VIEWS[kind]]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field(self.column(kind), pa.float32())]

    @staticmethod
    def scores(rows: Rows) -> np.ndarray:
        """float32 [n]."""
        first, second = (rows.vectors(f"{view}_embedding") for view in VIEWS[rows.corpus.kind])
        return np.einsum("nd,nd->n", first, second).astype(np.float32)

    def partial(self, rows: Rows) -> pa.Table:
        if self.top_fraction is None:
            return PARTIAL.empty_table()
        ids = id_words(rows.table["id"].to_pylist())
        score = self.scores(rows)
        good = score >= (self.min_score if self.min_score is not None else -2)
        columns = [score[good], ids[good, 0], ids[good, 1]]
        return pa.table([pa.array(values) for values in columns], schema=PARTIAL)

    def reduce(self, partials: Sequence[pa.Table], context: Context) -> pa.Table:
        """The last pair that stays: the threshold is (score, id), so exactly n stay."""
        tables = list(partials)
        table = pa.concat_tables(tables)
        if self.top_fraction is None or not table.num_rows:
            return PARTIAL.empty_table()
        score, id0, id1 = (table[name].to_numpy() for name in PARTIAL.names)
        order = np.lexsort((id1, id0, -score))
        count = max(round(self.top_fraction * len(order)), 1)
        last = order[count - 1]
        return pa.table([[score[last]], [id0[last]], [id1[last]]], schema=PARTIAL)

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        score = self.scores(rows)
        masks = {}
        if self.min_score is not None:
            masks["score_below_threshold"] = score < self.min_score
        if reduced.num_rows:
            cut, cut0, cut1 = (reduced[name].to_numpy()[0] for name in PARTIAL.names)
            ids = id_words(rows.table["id"].to_pylist())
            later = (ids[:, 0] > cut0) | ((ids[:, 0] == cut0) & (ids[:, 1] > cut1))
            masks["score_outside_top"] = (score < cut) | ((score == cut) & later)
        return Output({self.column(rows.corpus.kind): score}, reasons(len(rows), masks))
