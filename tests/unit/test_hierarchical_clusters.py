"""Clusters of clusters, sampling over them and clusters of a target set, against loops written from the papers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from cl.errors import ConfigError
from pipelines.kmeans import assign
from pipelines.plan import build_plan, parse_stages
from pipelines.stages.base import vector_array, vectors
from pipelines.stages.hierarchical_balance import tree_quotas
from pipelines.stages.hierarchical_clusters import HierarchicalClusters, nearest_of_each, resampled
from pipelines.streams import read_result
from tests.curation_corpora import run_plan
from tests.vector_corpora import unit_points, vector_corpus


def shares(sizes: list[int], target: int) -> list[int]:
    """min(size, c) with c such that the sum is the target, the rest to the first: one row at a time."""
    out = [0] * len(sizes)
    for _ in range(min(target, sum(sizes))):
        least = min(kept for kept, size in zip(out, sizes, strict=True) if kept < size)
        first = next(i for i, size in enumerate(sizes) if out[i] == least and out[i] < size)
        out[first] += 1
    return out


def sampled(tree: Any, target: int) -> list[int]:
    """The rows that each leaf keeps, depth first; a tree is a list of trees, a leaf its size."""
    if isinstance(tree, int):
        return [target]
    given = shares([count(each) for each in tree], target)
    return [leaf for each, share in zip(tree, given, strict=True) for leaf in sampled(each, share)]


def count(tree: Any) -> int:
    return tree if isinstance(tree, int) else sum(map(count, tree))


def test_quotas_of_a_tree_are_those_of_the_recursion() -> None:
    tree = [[[5, 4], [9]], [[2, 2, 30]], [[1], [1, 1], [40]]]
    sizes = np.array([5, 4, 9, 2, 2, 30, 1, 1, 1, 40])
    top, middle = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2]), np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5])
    for target in (0, 1, 7, 20, 45, 95, 200):
        assert tree_quotas(sizes, [top, middle], target).tolist() == sampled(tree, min(target, 95))


def test_rows_are_sampled_over_the_hierarchy(tmp_path: Path) -> None:
    points = unit_points(np.random.default_rng(0), 400, 8, 20, 0.3)
    corpus = vector_corpus(tmp_path / "c", {"anchor_embedding": points}, [150])
    clusters = {"count": 24, "levels": [8, 3], "resample": 2, "nearest": [3, 2], "iterations": 5}
    stages = [{"hierarchical_clusters": clusters}, {"hierarchical_balance": {"target": 100, "levels": 3}}]
    rows = run_plan(corpus, tmp_path / "o", stages, partitions=3).to_pylist()
    parents = {row["cluster"]: (row["cluster_level_2"], row["cluster_level_3"]) for row in rows}
    assert all(parents[row["cluster"]] == (row["cluster_level_2"], row["cluster_level_3"]) for row in rows)
    assert len({high for _, high in parents.values()}) == 3
    tree, leaves = [], []
    for high in range(3):
        middles = sorted({middle for middle, top in parents.values() if top == high})
        inside = [sorted(leaf for leaf, above in parents.items() if above == (middle, high)) for middle in middles]
        leaves += [leaf for each in inside for leaf in each]
        tree.append([[sum(row["cluster"] == leaf for row in rows) for leaf in each] for each in inside])
    kept = [sum(row["cluster"] == leaf and row["drop_reason"] is None for row in rows) for leaf in leaves]
    assert kept == sampled(tree, 100)
    assert sum(kept) == 100


def test_levels_are_kmeans_on_centroids(tmp_path: Path) -> None:
    """Four heaps of four heaps: the second level finds the four."""
    rng = np.random.default_rng(1)
    heaps = np.eye(8)[:4].repeat(4, 0) + 0.25 * rng.normal(size=(16, 8))
    points = heaps[np.arange(640) % 16] + 0.01 * rng.normal(size=(640, 8))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    corpus = vector_corpus(tmp_path / "c", {"anchor_embedding": points})
    stage = HierarchicalClusters(count=16, levels=(4,))
    rows = run_plan(corpus, tmp_path / "o", [stage]).to_pylist()
    fine = {(int(row["key"]) % 16, row["cluster"]) for row in rows}
    assert len(fine) == 16
    centroids = np.stack([points[np.arange(640) % 16 == heap].mean(0) for heap in range(16)]).astype(np.float32)
    plan = build_plan(corpus, parse_stages([stage]), str(tmp_path / "o"), 0)
    found = read_result(plan, 0, 0, 1).sort_by("cluster")
    cosine = vectors(found["centroid"]) @ (centroids / np.linalg.norm(centroids, axis=1, keepdims=True)).T
    assert cosine.max(1).min() > 0.999
    level_two = found["cluster_level_2"].to_numpy()
    again, means = resampled(vectors(found["centroid"]), 4, 20, 10, 5, True, 0)
    np.testing.assert_array_equal(level_two, again)
    np.testing.assert_array_equal(assign(vectors(found["centroid"]), means)[0], level_two)


def test_nearest_of_each_cluster() -> None:
    cluster, distance = np.array([0, 1, 0, 0, 1, 2]), np.array([0.3, 0.1, 0.1, 0.3, 0.2, 0.9])
    assert nearest_of_each(cluster, distance, 2).tolist() == [0, 1, 2, 4, 5]
    assert nearest_of_each(cluster, distance, 1).tolist() == [1, 2, 5]


def test_levels_must_shrink() -> None:
    for fields in ({"levels": (100,)}, {"levels": (50, 60)}, {"levels": ()}, {"levels": (9,), "nearest": (1, 2)}):
        with pytest.raises(ValidationError, match="level"):
            HierarchicalClusters(**fields)


def embedded_targets(folder: Path, points: np.ndarray) -> None:
    """An output of `clew embed` in two files."""
    folder.mkdir()
    (folder / ".embed.json").write_text(json.dumps({"key": "target"}))
    for number, part in enumerate(np.array_split(points, 2)):
        table = pa.table({"id": [str(i) for i in range(len(part))], "anchor_embedding": vector_array(part)})
        pq.write_table(table, folder / f"{number:05d}.parquet")


@pytest.mark.parametrize("partitions", [1, 3])
def test_clusters_stay_that_a_target_falls_into(tmp_path: Path, partitions: int) -> None:
    rng = np.random.default_rng(2)
    points, targets = unit_points(rng, 300, 6, 30, 0.2), unit_points(rng, 7, 6, 3, 0.2)
    embedded_targets(tmp_path / "t", targets)
    corpus = vector_corpus(tmp_path / "c", {"anchor_embedding": points}, [100])
    stage = {"target_clusters": {"count": 20, "full": 1, "against": [str(tmp_path / "t")]}}
    rows = run_plan(corpus, tmp_path / "o", [stage], partitions=partitions).to_pylist()
    plan = build_plan(corpus, parse_stages([stage]), str(tmp_path / "o"), 0, partitions=partitions)
    centroids = vectors(read_result(plan, 0, 0, partitions).sort_by("cluster")["centroid"]).astype(np.float64)
    nearest = [int((centroids @ target).argmax()) for target in targets]
    for row, point in zip(rows, points, strict=True):
        cluster = int((centroids @ point).argmax())
        assert (row["cluster"], row["cluster_targets"]) == (cluster, nearest.count(cluster))
        assert row["drop_reason"] == (None if cluster in nearest else "off_target")
    other = parse_stages([{"target_clusters": {"against": [str(tmp_path / "c")]}}])
    with pytest.raises(ConfigError, match=r"'target_clusters': .*c is no output of `clew embed`"):
        build_plan(corpus, other, str(tmp_path / "x"), 0)


@pytest.mark.parametrize("order", ["farthest", "closest", "best"])
def test_semantic_duplicates_of_a_cluster_in_order(tmp_path: Path, order: str) -> None:
    """SemDeDup as its paper has it (compare: all), and with a column as the rule."""
    rng = np.random.default_rng(5)
    points = unit_points(rng, 160, 4, 12, 0.08)
    cluster, quality = rng.integers(4, size=160), rng.integers(5, size=160).astype(float)
    near = rng.random(160).astype(np.float32)
    columns = {"cluster": cluster.tolist(), "cluster_distance": near.tolist(), "quality": quality.tolist()}
    corpus = vector_corpus(tmp_path / "c", {"anchor_embedding": points}, [60], **columns)
    rule = {"best": "quality"} if order == "best" else {"first": order}
    stage = {"semantic_duplicate": {"epsilon": 0.01, "compare": "all", **rule}}
    rows = run_plan(corpus, tmp_path / "o", [stage], partitions=3).to_pylist()
    sign = {"farthest": -near, "closest": near, "best": -quality}[order]
    for number in range(4):
        mine = sorted(np.flatnonzero(cluster == number).tolist(), key=lambda row: (sign[row], rows[row]["id"]))
        for place, row in enumerate(mine):
            largest = max((float(points[row] @ points[other]) for other in mine[:place]), default=-1.0)
            assert abs(largest - 0.99) > 1e-6
            assert (rows[row]["drop_reason"] is not None) == (largest > 0.99)
