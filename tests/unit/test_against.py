"""New samples beside a finished curation, against one loop over the rows that follows the documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cl.corpus import Corpus
from cl.errors import ConfigError, DataError
from pipelines.against import check_against
from pipelines.keyed import keyed_hash
from pipelines.plan import Plan, build_plan, parse_stages
from pipelines.run_steps import read_reduced
from pipelines.write import Placement, WriteConfig
from tests.curation_corpora import column_of, run_built
from tests.vector_corpora import row_id, unit_points, vector_corpus

SEED, WIDTH, EPSILON, MAX_TEXTS = 3, 8, 0.02, 3
STAGES: list[Any] = [
    "exact_duplicate",
    {"text_duplicate": {"threshold": 0.6, "bands": 128, "rows": 1, "columns": ["positive"]}},
    {"caption_template": {"max_texts": MAX_TEXTS}},
    {"select": {"column": "score", "fraction": 0.8}},
    {"clusters": {"column": "v", "count": 6, "points": 20}},
    {"semantic_duplicate": {"column": "v", "epsilon": EPSILON}},
    {"balance": {"fraction": 0.7}},
]
WORDS = (
    "red", "blue", "green", "small", "large", "old", "new", "house", "tree", "river", "hill", "cloud", "stone", "door",
    "lamp", "road",
)  # fmt: skip


def corpus_of(
    root: Path, first: int, count: int, rng: np.random.Generator, cuts: list[int], like: Corpus | None = None
) -> Corpus:
    """Random rows with likenesses among them, and to the rows of another corpus."""
    points = unit_points(rng, count, WIDTH, 12, 0.15)
    sentences = [" ".join(rng.choice(WORDS, 7)) for _ in range(40)]
    texts = []
    for row in range(count):
        words = str(rng.choice(sentences)).split()
        if rng.random() < 0.8:
            words = list(rng.choice(WORDS, 9))
        elif rng.random() < 0.7:
            words[-1] = str(rng.choice(WORDS))
        template = int(rng.integers(60))
        texts.append((f"{WORDS[template % 16]} {WORDS[template // 16]} photo {first + row}", " ".join(words)))
    for row in range(0, count, 9):  # equal content
        texts[row] = texts[(row * 7) % count]
    for row, other in zip(range(0, count, 3), rows_of(like) if like else (), strict=False):
        if row % 4 == 0:
            texts[row] = (other["anchor"], other["positive"])
        elif row % 4 == 1:
            texts[row] = (texts[row][0], " ".join([*other["positive"].split()[:-1], "new"]))
        else:
            points[row] = other["v"]
    ids = [row_id(first + row) for row in range(count)]
    return vector_corpus(root, {"v": points}, cuts, ids, texts, score=list(np.round(rng.random(count), 1)))


def plan_of(corpus: Corpus, out: Path, frozen: Plan | None = None, partitions: int = 3, stages: Any = STAGES) -> Plan:
    complete = [*parse_stages(stages), Placement(settings=WriteConfig())]
    return build_plan(corpus, complete, str(out), SEED, None, partitions, frozen)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}


def alike(one: str, other: str) -> bool:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b) >= 0.6


class Oracle:
    """Judges new rows one after the other by what an old run's table and corpus hold."""

    def __init__(self, old: Plan, table: list[dict[str, Any]], old_rows: list[dict[str, Any]]) -> None:
        names = [node.name for node in old.nodes]
        by_id = {row["id"]: row for row in old_rows}
        rows = [by_id[row["id"]] | row for row in table]
        self.kept = [row for row in rows if row["drop_stage"] is None]
        self.reached = {
            name: [row for row in rows if row["drop_stage"] is None or names.index(row["drop_stage"]) >= place]
            for place, name in enumerate(names)
        }
        node = old.named("clusters")
        assert node is not None
        reduced = read_reduced(old, node.number, 0).sort_by("cluster")
        self.centroids = np.array(reduced["centroid"].to_pylist(), np.float32)

    def judge(self, new: list[dict[str, Any]]) -> dict[str, str]:
        self.why: dict[str, str] = {}
        alive = list(new)
        for name in ("exact", "text", "template", "select", "semantic", "balance"):
            getattr(self, name)(alive)
            alive = [row for row in alive if row["id"] not in self.why]
        return self.why

    def exact(self, rows: list[dict[str, Any]]) -> None:
        seen = {row["content"] for row in self.kept}
        for row in rows:
            if row["content"] in seen:
                self.why[row["id"]] = "exact_duplicate"
            seen.add(row["content"])

    def text(self, rows: list[dict[str, Any]]) -> None:
        stay = [row["positive"] for row in self.kept]
        for row in sorted(rows, key=lambda each: each["id"]):
            if any(alike(row["positive"], other) for other in stay):
                self.why[row["id"]] = "text_duplicate"
            else:
                stay.append(row["positive"])

    def template(self, rows: list[dict[str, Any]]) -> None:
        def of(row: dict[str, Any]) -> str:
            return re.sub(r"\d+", "0", row["anchor"])

        there = [of(row) for row in self.kept]
        ids = [row["id"] for row in rows]
        coins = dict(zip(ids, keyed_hash(SEED, ids, "caption_template"), strict=True))
        for row in sorted(rows, key=lambda each: (coins[each["id"]], each["id"])):
            if there.count(of(row)) >= MAX_TEXTS:
                self.why[row["id"]] = "template_over_cap"
            there.append(of(row))

    def select(self, rows: list[dict[str, Any]]) -> None:
        stayed = [row for row in self.reached["select"] if row["drop_stage"] != "select"]
        last = max((-row["score"], row["id"]) for row in stayed)
        for row in rows:
            if (-row["score"], row["id"]) > last:
                self.why[row["id"]] = "outside_best"

    def cluster(self, row: dict[str, Any]) -> tuple[int, float]:
        cosines = self.centroids @ np.array(row["v"], np.float32)
        return int(cosines.argmax()), float(1 - cosines.max())

    def semantic(self, rows: list[dict[str, Any]]) -> None:
        stay = {cluster: [row["v"] for row in self.kept if row["cluster"] == cluster] for cluster in range(6)}
        placed = [(self.cluster(row), row) for row in rows]
        for (cluster, _), row in sorted(placed, key=lambda each: (-each[0][1], each[1]["id"])):
            if any(float(np.dot(row["v"], other)) > 1 - EPSILON for other in stay[cluster]):
                self.why[row["id"]] = "semantic_duplicate"
            else:
                stay[cluster].append(row["v"])

    def balance(self, rows: list[dict[str, Any]]) -> None:
        """A cluster's rows stay up to the last key that stayed before; all of them where none was dropped."""
        for row in rows:
            mine = [each for each in self.reached["balance"] if each["cluster"] == self.cluster(row)[0]]
            stayed = [each["id"] for each in mine if each["drop_stage"] is None]
            if len(stayed) < len(mine):
                keys = keyed_hash(SEED, [row["id"], *stayed], "balance")
                if keys[0] > max(keys[1:]):
                    self.why[row["id"]] = "cluster_over_cap"


def rows_of(corpus: Corpus) -> list[dict[str, Any]]:
    return list(corpus.read().to_pylist())


def test_new_rows_are_judged_one_by_one_as_documented(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    old_corpus = corpus_of(tmp_path / "old", 0, 300, rng, [210])
    new_corpus = corpus_of(tmp_path / "new", 1000, 200, rng, [60], old_corpus)
    old = plan_of(old_corpus, tmp_path / "a")
    table = run_built(old).to_pylist()
    expected = Oracle(old, table, rows_of(old_corpus)).judge(rows_of(new_corpus))
    plan = plan_of(new_corpus, tmp_path / "b", old)
    check_against(plan, old)
    found = {row["id"]: row["drop_reason"] for row in run_built(plan).to_pylist() if row["drop_reason"]}
    assert found == expected
    assert len(set(found.values())) == 6  # every stage had something to do


def test_what_the_old_run_kept_is_a_duplicate_when_it_comes_again(tmp_path: Path) -> None:
    stages = [{"select": {"column": "score", "fraction": 0.5}}, "exact_duplicate"]
    rng = np.random.default_rng(7)
    one, two = (corpus_of(tmp_path / name, 0, 60, rng, [30]) for name in ("one", "two"))
    first = plan_of(one, tmp_path / "a", stages=stages)
    kept = {row["id"]: row["content"] for row in run_built(first).to_pylist() if row["drop_stage"] is None}
    again = plan_of(one, tmp_path / "b", first, stages=stages)
    reasons = {row["id"]: row["drop_reason"] for row in run_built(again).to_pylist()}
    assert {row for row, why in reasons.items() if why == "exact_duplicate"} >= set(kept)
    of = column_of(again, "exact_duplicate", "exact_duplicate_of")
    assert set(of) - {None} <= set(kept)
    assert None not in reasons.values()  # what half of the scores kept out then is kept out now
    # A third run stands on both: what only the second one kept is known there.
    second = plan_of(two, tmp_path / "c", first, stages=stages)
    stays = {row["id"] for row in run_built(second).to_pylist() if row["drop_stage"] is None}
    third = run_built(plan_of(two, tmp_path / "d", second, stages=stages, partitions=1)).to_pylist()
    assert stays
    assert {row["drop_reason"] for row in third if row["id"] in stays} == {"exact_duplicate"}


def test_what_cannot_be_judged_is_refused_with_a_sentence(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    corpus = corpus_of(tmp_path / "old", 0, 60, rng, [])
    old = plan_of(corpus, tmp_path / "a")
    run_built(old)

    def refused(stages: Any, error: type[Exception], sentence: str, frozen: Plan = old) -> None:
        with pytest.raises(error, match=sentence):
            check_against(plan_of(frozen.corpus, tmp_path / "b", frozen, stages=stages), frozen)

    refused(STAGES[:-1], ConfigError, "stages must be those of .*: exact_duplicate, text_duplicate")
    refused([*STAGES[:-1], {"balance": {"fraction": 0.6}}], ConfigError, "Stage 'balance' has other settings")
    points = {"anchor_embedding": unit_points(rng, 6, WIDTH, 2, 0.1)}
    pairs = vector_corpus(tmp_path / "pairs", points | {"positive_embedding": points["anchor_embedding"]})
    mine = parse_stages([{"mine": {"count": 1}}])
    other = plan_of(pairs, tmp_path / "m", stages=mine)
    refused(mine, ConfigError, "Stage 'mine' compares all samples with each other", other)
    unrun = plan_of(corpus, tmp_path / "never")
    refused(STAGES, DataError, r"no longer holds what its stage 'exact_duplicate' found \(.nodes\): run that", unrun)


def test_unknown_groups_and_entries_stay(tmp_path: Path) -> None:
    from pipelines.stages.balance import Balance
    from pipelines.stages.base import Rows
    from pipelines.stages.entry_balance import EntryBalance
    from pipelines.stages.selection import CUTS

    corpus = corpus_of(tmp_path / "c", 0, 4, np.random.default_rng(0), [])
    ids = [row_id(row) for row in range(4)]
    rows = Rows(pa.table({"id": ids, "cluster": [1, 2, 2, 9]}), np.arange(4, dtype=np.int32), 0, corpus)
    cuts = pa.table([[2], [0], [0], [0], [0]], schema=CUTS)  # of cluster 2 none stays
    stage = Balance(target=1)
    assert list(stage.apply(rows, stage.freeze(cuts)).drop) == [None, "cluster_over_cap", "cluster_over_cap", None]  # type: ignore[arg-type]
    lists = pa.array([[0], [5], [], [0, 7]], pa.list_(pa.int32()))
    rows = Rows(pa.table({"id": ids, "entries": lists}), np.arange(4, dtype=np.int32), 0, corpus)
    known = pa.table({"language": [""], "entry": pa.array([0], pa.int32()), "probability": [0.0]})
    balanced = EntryBalance().apply(rows, known)
    assert list(balanced.drop) == ["entry_over_cap", None, "entry_over_cap", None]  # type: ignore[arg-type]
