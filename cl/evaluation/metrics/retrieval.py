"""Image-text retrieval in both directions.

For each distinct text, rank all distinct images by cosine similarity, and the other way round. R@k is the share of
queries with a correct candidate among the first k; a candidate is correct if any sample pairs the two.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from cl.config import Config
from cl.corpus import Kind
from cl.evaluation.items import Embedded
from cl.evaluation.registry import METRICS, Measured, Metric
from cl.evaluation.retrieval import examples, median_rank_figure, rank_direction, recall_figures


class RetrievalOptions(Config):
    """Options of `retrieval`."""

    k: list[int] = Field([1, 5, 10], min_length=1, description="the k of R@k")
    examples: int = Field(8, ge=0, description="queries a direction to show with their top 5")


@METRICS.register("retrieval", "image-text retrieval in both directions: R@k and median rank")
class Retrieval(Metric[RetrievalOptions]):
    """R@k and median rank, image to text and text to image."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"image-text"})
    Options = RetrievalOptions

    def measure(self, data: Embedded) -> Measured:
        measured = Measured()
        for query, candidate in (("image", "text"), ("text", "image")):
            name = f"retrieval/{query}_to_{candidate}"
            ranking = rank_direction(data, query, candidate)
            measured.figures += recall_figures(name, ranking, self.options.k)
            measured.figures.append(median_rank_figure(name, ranking))
            measured.examples += examples(data, ranking, query, candidate, self.options.examples)
        return measured
