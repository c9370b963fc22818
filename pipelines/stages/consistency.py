"""Consistency filter of text pairs: a pair stays if its positive is among the nearest to its anchor.

E5 (Wang et al. 2022, "Text Embeddings by Weakly-Supervised Contrastive Pre-training", section 3.1) ranks the passages
of a pool of a million for each query by a model trained on the unfiltered pairs, and keeps a pair if its own passage is
among the first two; nomic embed (Nussbaum et al. 2024) does the same with a model of others. With `both` the anchor
must be among the nearest to its positive too.

The rank is one plus the number of documents that score *higher*: of documents with equal scores all have the same rank.
Equal documents count once, or a pair whose document is there twice could lose to itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from cl.corpus import Kind
from pipelines.nearest import count_better, exact_scores
from pipelines.shuffle import Routed
from pipelines.stages.base import Output, Rows, reasons, vectors
from pipelines.stages.keyed import Inbox, Round, Streams
from pipelines.stages.neighbours import Neighbours, digests, holder, occurrences
from pipelines.stages.registry import STAGES


@STAGES.register(
    "consistency",
    "Drop pairs whose positive is not among the nearest documents to their anchor",
    "Text Embeddings by Weakly-Supervised Contrastive Pre-training",
)
class Consistency(Neighbours):
    """Writes `consistency_rank`, 1 the best, and with `both` `consistency_rank_back`, that of the anchor."""

    drops: ClassVar[bool] = True

    top: int = Field(2, ge=1, description="rank up to which a pair stays")
    both: bool = Field(False, description="whether the anchor must be found from its positive too")

    def sides(self, kind: Kind) -> list[tuple[str, str]]:
        forth = super().sides(kind)[0]
        return [forth, forth[::-1]] if self.both else [forth]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field(name, pa.int64()) for name in self._names()]

    def _names(self) -> list[str]:
        return ["consistency_rank", "consistency_rank_back"][: 1 + self.both]

    def rounds(self) -> list[Round]:
        return [*self.collecting(), Round("rank", "fragments", (), ("verdicts",), self._rank)]

    def _rank(self, inbox: Inbox) -> Streams:
        ranks = []
        for side, (query, document) in enumerate(self.sides(inbox.kind)):
            queries, own = (vectors(inbox.columns.read(inbox.task, f"{view}_embedding")) for view in (query, document))
            which = digests(inbox.columns.read(inbox.task, holder(inbox.kind, document)))
            rows = np.arange(len(queries))
            line = exact_scores(queries, rows, own, rows)
            better = np.zeros(len(rows), np.int64)
            for tile, documents in self.documents(inbox, side):
                better += count_better(queries, documents.vectors, line, occurrences(which, rows, tile))
            ranks.append(better + 1)
        table = pa.table(ranks, names=self._names())
        return {"verdicts": Routed(table, np.full(table.num_rows, inbox.task))}

    def apply(self, rows: Rows, reduced: pa.Table) -> Output:
        ranks: dict[str, Any] = {name: reduced[name].to_numpy() for name in self._names()}
        bad = np.logical_or.reduce([rank > self.top for rank in ranks.values()])
        return Output(ranks, reasons(len(rows), {"inconsistent": bad}))
