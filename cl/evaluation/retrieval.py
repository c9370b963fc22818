"""Retrieval in one direction: figures from ranks, and examples to look at. Shared by image-text and text pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cl.evaluation import chance
from cl.evaluation.items import Embedded
from cl.evaluation.ranks import (
    Ranking,
    mean_reciprocal_rank,
    ndcg_at,
    rank_pairs,
    recall_at,
    top_candidates,
)
from cl.evaluation.registry import Example, Figure, share_error


def rank_direction(data: Embedded, query: str, candidate: str) -> Ranking:
    """Rank the items of one view for each item of another."""
    return rank_pairs(data.views[query].embeddings, data.views[candidate].embeddings, data.pairs(query, candidate))


def recall_figures(name: str, ranking: Ranking, ks: Sequence[int]) -> list[Figure]:
    """R@k: share of queries with a correct candidate among the first k."""
    figures = []
    for k in ks:
        share = recall_at(ranking, k)
        figures.append(
            Figure(
                metric=f"{name}/R@{k}",
                value=share,
                chance=chance.recall(ranking.correct, ranking.candidates, k),
                higher_is_better=True,
                stderr=share_error(share, ranking.queries),
                queries=ranking.queries,
                candidates=ranking.candidates,
            )
        )
    return figures


def median_rank_figure(name: str, ranking: Ranking) -> Figure:
    """Median over the queries of the rank of the first correct candidate."""
    return Figure(
        metric=f"{name}/median_rank",
        value=float(np.median(ranking.first)),
        chance=chance.median_rank(ranking.correct, ranking.candidates),
        higher_is_better=False,
        queries=ranking.queries,
        candidates=ranking.candidates,
    )


def mrr_figure(name: str, ranking: Ranking) -> Figure:
    """Mean reciprocal rank of the first correct candidate."""
    return Figure(
        metric=f"{name}/MRR",
        value=mean_reciprocal_rank(ranking),
        chance=chance.reciprocal_rank(ranking.correct, ranking.candidates),
        higher_is_better=True,
        queries=ranking.queries,
        candidates=ranking.candidates,
    )


def ndcg_figure(name: str, ranking: Ranking, k: int) -> Figure:
    """nDCG@k with binary gains."""
    return Figure(
        metric=f"{name}/nDCG@{k}",
        value=ndcg_at(ranking, k),
        chance=chance.ndcg(ranking.correct, ranking.candidates, k),
        higher_is_better=True,
        queries=ranking.queries,
        candidates=ranking.candidates,
    )


def examples(data: Embedded, ranking: Ranking, query: str, candidate: str, count: int) -> list[Example]:
    """The queries with the smallest sample ids (which are hashes: an arbitrary but fixed choice) and their top 5."""
    query_ids, candidate_ids = data.ids(query), data.ids(candidate)
    query_texts, candidate_texts = data.texts(query), data.texts(candidate)
    chosen = sorted(range(ranking.queries), key=query_ids.__getitem__)[:count]
    if not chosen:
        return []
    places, scores = top_candidates(data.views[query].embeddings[chosen], data.views[candidate].embeddings, 5)
    pairs = data.pairs(query, candidate)
    pairs = pairs[np.isin(pairs[:, 0], chosen)]
    correct = {(int(q), int(c)) for q, c in pairs}
    first = ranking.first
    return [
        Example(
            direction=f"{query}_to_{candidate}",
            query=query_texts[q],
            query_id=query_ids[q],
            rank=int(first[q]),
            top=[candidate_ids[c] for c in top],
            top_texts=[candidate_texts[c] for c in top],
            top_scores=[round(float(score), 6) for score in own],
            top_correct=[(q, int(c)) in correct for c in top],
        )
        for q, top, own in zip(chosen, places, scores, strict=True)
    ]
