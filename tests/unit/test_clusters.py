"""k-means out of core, and exact selections, against plain loops."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines.kmeans
from pipelines.kmeans import assign, cluster_sums, fill_empty, kmeans, seeds
from pipelines.plan import Plan, build_plan, parse_stages, segments
from pipelines.rounds import here, run_rounds
from pipelines.run_steps import run_steps
from pipelines.stages.base import vectors
from pipelines.stages.selection import ascending
from pipelines.streams import read_result
from tests.curation_corpora import run_plan
from tests.vector_corpora import row_id, unit_points, vector_corpus


def kept(table: pa.Table) -> set[str]:
    return {row["key"] for row in table.to_pylist() if row["drop_reason"] is None}


@given(values=st.lists(st.floats(width=32), min_size=2, max_size=30), wide=st.booleans())
@settings(max_examples=200, deadline=None)
def test_words_are_in_the_order_of_the_numbers(values: list[float], wide: bool) -> None:
    numbers = np.array(values, np.float64 if wide else np.float32)
    words = ascending(numbers).tolist()
    plain = [float("inf") if np.isnan(value) else float(value) for value in numbers]
    for one, first in zip(words, plain, strict=True):
        for other, second in zip(words, plain, strict=True):
            assert (one < other) == (first < second)
            assert (one == other) == (first == second)


@pytest.mark.parametrize(("cuts", "partitions"), [([], 1), ([7, 7, 90], 1), ([50], 5)])
@pytest.mark.parametrize("levels", [3, 1_000_000], ids=["ties", "distinct"])
def test_the_best_are_exactly_those_of_a_sort(tmp_path: Path, cuts: list[int], partitions: int, levels: int) -> None:
    rng = np.random.default_rng(levels)
    values = (rng.integers(levels, size=120) / levels - 0.5).tolist()
    values[5] = None
    # Of the ids a third begin alike, so that no digit tells them apart.
    ids = [f"{7 * (row % 3):016x}{row_id(row)[16:]}" for row in range(120)]
    corpus = vector_corpus(tmp_path / "c", {}, cuts, ids, score=values)
    stage: dict[str, Any] = {"column": "score", "min": -0.45, "target": 37}
    table = run_plan(corpus, tmp_path / "o", [{"select": stage}], partitions=partitions)
    rows = [row for row in table.to_pylist() if row["score"] is not None and row["score"] >= -0.45]
    best = sorted(rows, key=lambda row: (-row["score"], row["id"]))[:37]
    assert kept(table) == {row["key"] for row in best}
    reasons = Counter(table["drop_reason"].to_pylist())
    assert reasons == {None: 37, "below_minimum": 120 - len(rows), "outside_best": len(rows) - 37}
    lowest = run_plan(corpus, tmp_path / "p", [{"select": {"column": "score", "fraction": 0.1, "lowest": True}}])
    rows = [row for row in table.to_pylist() if row["score"] is not None]
    assert kept(lowest) == {row["key"] for row in sorted(rows, key=lambda row: (row["score"], row["id"]))[:12]}


@pytest.mark.parametrize("choose", ["random", "closest"])
def test_each_cluster_keeps_its_first_rows(tmp_path: Path, choose: str) -> None:
    rng = np.random.default_rng(3)
    cluster = rng.choice(6, p=[0.5, 0.2, 0.15, 0.1, 0.04, 0.01], size=200)
    near = (rng.integers(4, size=200) / 4).astype(np.float32)
    columns = {"cluster": cluster.tolist(), "cluster_distance": near.tolist()}
    stage = {"balance": {"target": 90, "choose": choose}}
    whole = vector_corpus(tmp_path / "a", {}, **columns)
    parts = vector_corpus(tmp_path / "b", {}, [3, 100, 150], **columns)
    table = run_plan(whole, tmp_path / "ao", [stage])
    assert kept(table) == kept(run_plan(parts, tmp_path / "bo", [stage], partitions=4))
    sizes = np.bincount(cluster)
    cap = max(c for c in range(200) if np.minimum(sizes, c).sum() <= 90)
    rest = 90 - int(np.minimum(sizes, cap).sum())
    rows = table.to_pylist()
    for number, size in enumerate(sizes.tolist()):
        mine = [row for row in rows if row["cluster"] == number]
        quota = min(size, cap)
        if size > cap and rest:
            quota, rest = quota + 1, rest - 1
        stays = {row["key"] for row in mine if row["drop_reason"] is None}
        assert len(stays) == quota
        if choose == "closest":
            best = sorted(mine, key=lambda row: (row["cluster_distance"], row["id"]))[:quota]
            assert stays == {row["key"] for row in best}


def reduce_clusters(corpus: Any, out: Path, stage: dict[str, Any], partitions: int = 1) -> tuple[Plan, np.ndarray]:
    """The plan of one stage `clusters` and the centroids it ends with."""
    plan = build_plan(corpus, parse_stages([{"clusters": stage}]), str(out), 0, partitions=partitions)
    for number in range(len(corpus.fragments)):
        run_steps(plan, segments(plan)[0], number, {})
    run_rounds(plan, 0, here(plan, 0))
    table = read_result(plan, 0, 0, partitions).sort_by("cluster")
    return plan, vectors(table["centroid"])


def lloyd(points: np.ndarray, centroids: np.ndarray, rounds: int) -> np.ndarray:
    """Spherical k-means as one loop in float64."""
    centroids = centroids.astype(np.float64)
    for _ in range(rounds):
        nearest = (points.astype(np.float64) @ centroids.T).argmax(1)
        means = np.stack([points[nearest == number].mean(0, dtype=np.float64) for number in range(len(centroids))])
        centroids = means / np.linalg.norm(means, axis=1, keepdims=True)
    return centroids


def test_rounds_over_the_corpus_are_lloyds(tmp_path: Path) -> None:
    points = unit_points(np.random.default_rng(0), 600, 8, 12, 0.4)
    vector = {"anchor_embedding": points}
    stage = {"count": 10, "points": 8, "iterations": 3}
    corpus = vector_corpus(tmp_path / "c", vector, [100, 100, 350])
    _, start = reduce_clusters(corpus, tmp_path / "o0", stage)
    np.testing.assert_allclose(np.linalg.norm(start, axis=1), 1, atol=1e-6)
    _, found = reduce_clusters(corpus, tmp_path / "o3", {**stage, "full": 3})
    np.testing.assert_allclose(found, lloyd(points, start, 3), atol=1e-5)
    _, other = reduce_clusters(corpus, tmp_path / "o4", {**stage, "full": 3}, partitions=4)
    np.testing.assert_array_equal(found, other)  # whatever the number of tasks, every bit
    order = np.random.default_rng(1).permutation(600)
    ids = [row_id(row) for row in order.tolist()]
    again = vector_corpus(tmp_path / "d", {"anchor_embedding": points[order]}, [311], ids)
    np.testing.assert_array_equal(start, reduce_clusters(again, tmp_path / "o5", stage)[1])
    np.testing.assert_allclose(found, reduce_clusters(again, tmp_path / "o6", {**stage, "full": 3})[1], atol=1e-6)


@pytest.mark.parametrize(("points", "full"), [(256, 0), (24, 4)])
def test_inertia_is_within_a_percent_of_faiss_on_everything(tmp_path: Path, points: int, full: int) -> None:
    data = unit_points(np.random.default_rng(1), 12_000, 16, 60, 0.5)
    corpus = vector_corpus(tmp_path / "c", {"anchor_embedding": data}, [5000])
    table = run_plan(corpus, tmp_path / "o", [{"clusters": {"count": 40, "points": points, "full": full}}])
    peer = faiss.Kmeans(16, 40, niter=20, spherical=True, seed=1, max_points_per_centroid=12_000)
    peer.train(data)
    inertia = float(np.sum(table["cluster_distance"].to_numpy()))
    cosine = data @ np.asarray(peer.centroids).T
    assert inertia < 1.01 * float((1 - cosine.max(1)).sum())


def test_a_lost_reduction_goes_on_behind_its_last_round(tmp_path: Path) -> None:
    points = unit_points(np.random.default_rng(2), 300, 8, 6, 0.4)
    corpus = vector_corpus(tmp_path / "c", {"anchor_embedding": points}, [90, 200])
    stage = {"count": 5, "points": 10, "iterations": 2, "full": 3}
    _, expected = reduce_clusters(corpus, tmp_path / "whole", stage, partitions=2)
    plan = build_plan(corpus, parse_stages([{"clusters": stage}]), str(tmp_path / "o"), 0, partitions=2)
    for number in range(3):
        run_steps(plan, segments(plan)[0], number, {})
    folder = tmp_path / "o" / ".nodes" / plan.nodes[0].key / "shuffle-2"
    done: list[tuple[int, int, int]] = []

    def dies_at(limit: int) -> Any:
        def run(tasks: Any) -> Any:
            for task in tasks:
                if len(done) == limit:
                    raise KeyboardInterrupt
                done.append(task)
                yield from here(plan, 0)([task])

        return run

    for limit in (2, 6, 9, 13):
        with pytest.raises(KeyboardInterrupt):
            run_rounds(plan, 0, dies_at(limit))
        assert not plan.reduced(0)
        assert len(list(folder.iterdir())) <= 4, "what no round will read is gone"
    run_rounds(plan, 0, dies_at(10**6))
    table = read_result(plan, 0, 0, 2).sort_by("cluster")
    np.testing.assert_array_equal(vectors(table["centroid"]), expected)
    rounds = [number for number, _, _ in done]
    assert rounds == sorted(rounds), "no finished round is done again"
    assert sorted(path.name for path in folder.iterdir()) == ["centroids", "partial"]


def test_nearest_centroid_ties_and_euclidean_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.kmeans, "SUMMED", 16)
    rng = np.random.default_rng(3)
    points, centroids = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(5, 6)).astype(np.float32)
    centroids[3] = centroids[1]
    cluster, distance = assign(points, centroids, spherical=False)
    square = ((points[:, None].astype(np.float64) - centroids) ** 2).sum(2)
    np.testing.assert_array_equal(cluster, square.argmin(1))
    np.testing.assert_allclose(distance, square.min(1), rtol=1e-4)
    cluster, distance = assign(points, centroids)
    np.testing.assert_array_equal(cluster, (points.astype(np.float64) @ centroids.T.astype(np.float64)).argmax(1))
    found, sizes, sums = cluster_sums(points, cluster)
    for number, size, total in zip(found, sizes, sums, strict=True):
        assert size == (cluster == number).sum()
        np.testing.assert_allclose(total, points[cluster == number].sum(0, dtype=np.float64))


def test_no_cluster_stays_empty_and_seeds_lie_far_apart() -> None:
    rng = np.random.default_rng(4)
    points = unit_points(rng, 400, 5, 8, 0.01)
    start = seeds(points, 8, rng)
    assert len({int((points @ each).argmax()) // 1 for each in start}) == 8
    cosine = start @ start.T - 2 * np.eye(8)
    assert cosine.max() < 0.99, "one seed in each of the eight heaps"
    filled = fill_empty(np.eye(4, dtype=np.float32), np.array([10, 0, 3, 0]), True)
    cosine = filled @ np.eye(4, dtype=np.float32).T
    assert cosine.argmax(1).tolist() == [0, 0, 2, 0]
    assert len({tuple(row) for row in filled.tolist()}) == 4
    centroids, _ = kmeans(points, np.repeat(points[:1], 8, 0), 10)
    cluster, _ = assign(points, centroids)
    assert len(set(cluster.tolist())) == 8
