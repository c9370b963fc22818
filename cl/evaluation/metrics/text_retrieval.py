"""Retrieval of text pairs: for each distinct anchor, rank all distinct positives.

MRR is the mean of 1/rank of the first correct text; nDCG@k weighs a correct text at rank r by 1/log2(1 + r)
(Jaervelin and Kekaelaeinen, "Cumulated gain-based evaluation of IR techniques", 2002).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from cl.config import Config
from cl.corpus import Kind
from cl.evaluation.items import Embedded
from cl.evaluation.registry import METRICS, Measured, Metric
from cl.evaluation.retrieval import (
    examples,
    median_rank_figure,
    mrr_figure,
    ndcg_figure,
    rank_direction,
    recall_figures,
)


class TextRetrievalOptions(Config):
    """Options of `text_retrieval`."""

    k: list[int] = Field([1, 5, 10], min_length=1, description="the k of R@k")
    ndcg_k: int = Field(10, ge=1, description="the k of nDCG@k")
    both: bool = Field(False, description="measure positive to anchor as well")
    examples: int = Field(8, ge=0, description="queries a direction to show with their top 5")


@METRICS.register(
    "text_retrieval",
    "retrieval of text pairs: MRR, nDCG@10, R@k and median rank",
    paper="Cumulated gain-based evaluation of IR techniques",
)
class TextRetrieval(Metric[TextRetrievalOptions]):
    """MRR, nDCG@k, R@k and median rank, anchor to positive."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"text-text"})
    Options = TextRetrievalOptions

    def measure(self, data: Embedded) -> Measured:
        measured = Measured()
        directions = [("anchor", "positive"), ("positive", "anchor")]
        for query, candidate in directions[: 1 + self.options.both]:
            name = f"text_retrieval/{query}_to_{candidate}"
            ranking = rank_direction(data, query, candidate)
            measured.figures += [mrr_figure(name, ranking), ndcg_figure(name, ranking, self.options.ndcg_k)]
            measured.figures += recall_figures(name, ranking, self.options.k)
            measured.figures.append(median_rank_figure(name, ranking))
            measured.examples += examples(data, ranking, query, candidate, self.options.examples)
        return measured
