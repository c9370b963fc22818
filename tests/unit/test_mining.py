"""The consistency filter and mined negatives against loops in numpy, on embeddings with many equal scores."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cl.config import parse_config
from cl.corpus import Corpus, Fragment, Kind
from cl.encoders import load_checkpoint_model
from cl.errors import ConfigError
from pipelines.nearest import Documents, Nearest, count_better
from pipelines.placement import WriteConfig
from pipelines.plan import build_plan, named, parse_stages
from pipelines.stages.base import Output, Rows, RowStage, vector_array
from pipelines.stages.mine import Mine
from pipelines.write import carried
from tests.curation_corpora import column_of, run_plan, text_corpus
from tests.unit.test_curation_plan import checkpoint

WIDTH = 6


class Planted(RowStage):
    """Embeddings of quarters that follow from a text's first word: many texts share one, many scores are equal."""

    name: ClassVar[str] = "planted"

    def needs(self, kind: Kind) -> list[str]:
        return ["anchor", "positive"]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field(f"{view}_embedding", pa.list_(pa.float16(), WIDTH)) for view in ("anchor", "positive")]

    def run(self, rows: Rows) -> Output:
        return Output({f"{view}_embedding": vector_array(planted(rows.texts(view))) for view in ("anchor", "positive")})


def planted(texts: list[str]) -> np.ndarray:
    """float64 [n, WIDTH]."""
    words = [int(text.split()[0].strip("ABab")) for text in texts]
    draws = [np.random.default_rng(word).integers(-2, 3, WIDTH) / 4 for word in words]
    return np.array(draws).reshape(-1, WIDTH)


@lru_cache(maxsize=1)
def pairs() -> tuple[tuple[str, str], ...]:
    """150 pairs; documents come again in other case, anchors come again with other documents, some texts are both."""
    rng = np.random.default_rng(0)
    out = []
    for number in range(150):
        word = rng.integers(40)
        anchor = f"{word} anchor {rng.integers(3)}"
        positive = f"{word if rng.random() < 0.7 else rng.integers(60)} document {rng.integers(4)}"
        out.append((anchor, positive.upper() if number % 3 else positive))
    out[7] = (out[7][1], out[7][1])
    out[20] = (out[21][1].upper(), out[20][1])
    return tuple(out)


def corpora(root: Path) -> list[Corpus]:
    """The same samples in three fragments, one of them empty, and in one."""
    three = text_corpus(root / "three", [pairs()[:60], [], pairs()[60:]])
    one = root / "one" / "samples"
    one.mkdir(parents=True)
    table = three.read()
    pq.write_table(table.take(pa.array(np.random.default_rng(1).permutation(table.num_rows))), one / "00000.parquet")
    fragment = Fragment(
        path="samples/00000.parquet", samples=table.num_rows, shard="samples/00000.parquet", row_groups=[table.num_rows]
    )
    whole = Corpus(kind="text-text", samples=table.num_rows, fragments=[fragment], root=str(root / "one"))
    whole.write(str(root / "one"))
    return [three, whole]


def result(corpus: Corpus, out: Path, stage: dict[str, Any], partitions: int, seed: int = 0) -> dict[str, dict]:
    """What a stage says of each sample, by id, lists included."""
    stages = [Planted(), *parse_stages([stage])]
    table = run_plan(corpus, out, stages, seed=seed, partitions=partitions)
    plan = build_plan(corpus, stages, str(out), seed, partitions=partitions)
    made = {field.name: column_of(plan, plan.nodes[-1].name, field.name) for field in plan.nodes[-1].made}
    rows = {row["id"]: row for row in table.to_pylist()}
    for number, each in enumerate(table["id"].to_pylist()):
        rows[each] |= {name: values[number] for name, values in made.items()}
    return rows


def normal(text: str) -> str:
    return " ".join(text.split()).casefold()


@lru_cache(maxsize=1)
def scores() -> np.ndarray:
    """float64 [pairs, pairs]: of each anchor and each positive."""
    anchors, positives = zip(*pairs(), strict=True)
    return planted(list(anchors)) @ planted(list(positives)).T


def documents(ids: list[str], side: int = 1) -> dict[str, int]:
    """Distinct text -> the pair of the smallest id that has it."""
    out: dict[str, int] = {}
    for number in sorted(range(len(ids)), key=lambda each: ids[each]):
        out.setdefault(normal(pairs()[number][side]), number)
    return out


def ids_in_order(corpus: Corpus) -> list[str]:
    return list(corpus.read(["id"])["id"].to_pylist())


@pytest.mark.parametrize("both", [False, True])
def test_consistency_is_the_rank_among_distinct_documents_ties_passing(tmp_path: Path, both: bool) -> None:
    three, one = corpora(tmp_path)
    found = result(three, tmp_path / "o3", {"consistency": {"top": 6, "both": both}}, partitions=3)
    ids = ids_in_order(three)
    score, positives, anchors = scores(), documents(ids), documents(ids, 0)
    expected = {}
    for number, (anchor, positive) in enumerate(pairs()):
        own = score[number, number]
        forth = sum(score[number, other] > own for text, other in positives.items() if text != normal(positive))
        back = sum(score[other, number] > own for text, other in anchors.items() if text != normal(anchor))
        ranks = (forth + 1, back + 1)[: 1 + both]
        expected[ids[number]] = (*ranks, "inconsistent" if max(ranks) > 6 else None)
    names = ["consistency_rank", *(["consistency_rank_back"] if both else []), "drop_reason"]
    assert {each: tuple(row[name] for name in names) for each, row in found.items()} == expected
    assert 20 < sum(each[-1] is None for each in expected.values()) < 130
    again = result(one, tmp_path / "o1", {"consistency": {"top": 6, "both": both}}, partitions=1)
    assert {each: tuple(row[name] for name in names) for each, row in again.items()} == expected


def test_a_pool_holds_about_so_many_and_ranks_are_among_it(tmp_path: Path) -> None:
    three, one = corpora(tmp_path)
    whole = result(three, tmp_path / "w", {"consistency": {"top": 1}}, partitions=2)
    some = result(three, tmp_path / "s", {"consistency": {"top": 1, "pool": 40}}, partitions=3)
    same = result(one, tmp_path / "t", {"consistency": {"top": 1, "pool": 40}}, partitions=1)
    other = result(three, tmp_path / "u", {"consistency": {"top": 1, "pool": 40}}, partitions=1, seed=1)

    def ranks(rows: dict[str, dict]) -> dict[str, int]:
        return {each: row["consistency_rank"] for each, row in rows.items()}

    assert ranks(some) == ranks(same) != ranks(other)
    assert all(rank <= ranks(whole)[each] for each, rank in ranks(some).items())
    share = sum(rank - 1 for rank in ranks(some).values()) / sum(rank - 1 for rank in ranks(whole).values())
    total = len(documents(ids_in_order(three)))
    assert share == pytest.approx(40 / total, abs=4 * np.sqrt(40) / total)


SETTINGS = [
    {"count": 4, "ranks": (1, 20), "relative": 0.9},
    {"count": 5, "ranks": (4, 11), "relative": None, "margin": 0.2, "min_score": -0.3, "positives": 3},
    {"count": 3, "ranks": (2, 30), "relative": 1.0, "max_score": 0.5, "require": 2},
]


def expected_negatives(ids: list[str], settings: dict[str, Any]) -> dict[str, tuple[list[int], list[int]]]:
    """id -> pairs whose positives are its negatives, and those whose positives are its further positives."""
    score, known = scores(), documents(ids)
    low, high = settings["ranks"]
    out = {}
    for number, (anchor, positive) in enumerate(pairs()):
        right = {normal(positive), normal(anchor)}
        right |= {normal(each) for other, each in pairs() if normal(other) == normal(anchor)}
        candidates = [other for text, other in known.items() if text not in right]
        candidates.sort(key=lambda other: (-score[number, other], ids[other]))
        own = score[number, number]
        near = [other for other in candidates[:high] if score[number, other] >= own][: settings.get("positives", 0)]
        limits = [settings.get("max_score", np.inf)]
        if settings.get("relative") is not None:
            limits.append(own - (1 - settings["relative"]) * abs(own))
        if settings.get("margin") is not None:
            limits.append(own - settings["margin"])
        good = [
            other
            for other in candidates[low - 1 : high]
            if settings.get("min_score", -np.inf) <= score[number, other] <= min(limits)
            and not (settings.get("positives") and score[number, other] >= own)
        ]
        out[ids[number]] = (good[: settings["count"]], near)
    return out


@pytest.mark.parametrize("settings", SETTINGS)
def test_negatives_are_those_of_a_loop(tmp_path: Path, settings: dict[str, Any]) -> None:
    three, one = corpora(tmp_path)
    ids = ids_in_order(three)
    expected = expected_negatives(ids, settings)
    places = {each: number for number, each in enumerate(ids)}
    for corpus, partitions in ((three, 3), (one, 1)):
        found = result(corpus, tmp_path / f"o{partitions}", {"mine": settings}, partitions)
        for each, (negatives, positives) in expected.items():
            row = found[each]
            assert row["mined_ids"] == [ids[other] for other in negatives]
            assert row["mined_texts"] == [pairs()[other][1] for other in negatives]
            assert row["mined_scores"] == [scores()[places[each], other] for other in negatives]
            assert row["mined_ranks"] == sorted(row["mined_ranks"])
            assert row["mined_count"] == len(negatives)
            assert (row["drop_reason"] == "too_few_negatives") == (len(negatives) < settings.get("require", 0))
            if "positives" in settings:
                assert row["neighbour_ids"] == [ids[other] for other in positives]
    assert sum(len(negatives) for negatives, _ in expected.values()) > 200
    assert sum(len(negatives) == settings["count"] for negatives, _ in expected.values()) > 20
    assert "positives" not in settings or sum(len(positives) for _, positives in expected.values()) > 50


def test_a_keyed_choice_is_within_the_band_and_follows_the_seed(tmp_path: Path) -> None:
    three, one = corpora(tmp_path)
    settings = {"count": 3, "ranks": (3, 20), "relative": 0.95, "choose": "random"}
    found = result(three, tmp_path / "a", {"mine": settings}, partitions=2)
    same = result(one, tmp_path / "b", {"mine": settings}, partitions=1)
    other = result(three, tmp_path / "c", {"mine": settings}, partitions=1, seed=1)
    all_of = result(three, tmp_path / "d", {"mine": settings | {"count": 20, "choose": "nearest"}}, partitions=1)
    chosen = {each: row["mined_ids"] for each, row in found.items()}
    assert chosen == {each: row["mined_ids"] for each, row in same.items()}
    assert chosen != {each: row["mined_ids"] for each, row in other.items()}
    for each, ids in chosen.items():
        assert set(ids) <= set(all_of[each]["mined_ids"])
        assert len(ids) == min(3, all_of[each]["mined_count"])
    assert chosen != {each: row["mined_ids"][:3] for each, row in all_of.items()}


def test_a_guide_refuses_what_it_holds_for_right(tmp_path: Path) -> None:
    three, _ = corpora(tmp_path)
    folder = checkpoint(tmp_path / "guide", text=True)
    settings = {"count": 50, "ranks": (1, 50), "relative": 1.0}
    plain = result(three, tmp_path / "p", {"mine": settings}, partitions=1)
    guided = result(three, tmp_path / "g", {"mine": settings | {"guide": str(folder), "guide_margin": 0.02}}, 2)
    model, inputs, _ = load_checkpoint_model(folder)

    def embed(view: str, texts: list[str]) -> np.ndarray:
        values = model.encode(view, inputs.texts(view, texts)).detach().double().numpy()
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    refused = 0
    for each, row in plain.items():
        if not row["mined_ids"]:
            continue
        anchor = embed("anchor", [row["anchor"]])[0]
        right, *others = embed("positive", [row["positive"], *row["mined_texts"]]) @ anchor
        sure = {text for text, score in zip(row["mined_texts"], others, strict=True) if score < right - 0.024}
        wrong = {text for text, score in zip(row["mined_texts"], others, strict=True) if score > right - 0.016}
        assert sure <= set(guided[each]["mined_texts"]) <= set(row["mined_texts"]) - wrong
        refused += len(wrong)
    assert refused > 100
    assert sum(row["mined_count"] for row in guided.values()) > 100


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_tiles_and_rounding_do_not_matter(scale: float) -> None:
    """Vectors that differ in the last bits of float32 scores are still told apart, or found equal."""
    rng = np.random.default_rng(0)
    base = (rng.standard_normal((5, 64)) * scale / 8).astype(np.float16)
    documents = np.repeat(base, 600, 0)
    noise = rng.integers(-1, 2, documents.shape) * (rng.random(documents.shape) < 0.02)
    documents = (documents.view(np.int16) + noise).astype(np.int16).view(np.float16)
    queries = (rng.standard_normal((1100, 64)) * scale / 8).astype(np.float16)
    exact = queries.astype(np.float64) @ documents.astype(np.float64).T
    ids = rng.integers(0, 50, (len(documents), 2)).astype(np.uint64)  # some ids are equal in their first half
    nobody = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    skip = (np.arange(0, 1100, 3), np.arange(0, 1100, 3) % 1500)
    line = exact[np.arange(1100), np.arange(1100) % 3000]
    q, d = queries.astype(np.float32), documents.astype(np.float32)
    counted = count_better(q, d[:1500], line, skip) + count_better(q, d[1500:], line, nobody)
    allowed = np.ones(exact.shape, bool)
    allowed[skip] = False
    assert counted.tolist() == ((exact > line[:, None]) & allowed).sum(1).tolist()
    found = Nearest(q, 12)
    for start, end in itertools.pairwise([0, 7, 1500, 3000]):
        mine = (skip[1] >= start) & (skip[1] < end)
        part = Documents(d[start:end], ids[start:end], np.arange(start, end))
        found.add(part, (skip[0][mine], skip[1][mine] - start))
    masked = np.where(allowed, exact, -np.inf)
    for row in range(0, 1100, 7):
        order = np.lexsort((ids[:, 1], ids[:, 0], -masked[row]))[:12]
        assert found.score[row].tolist() == masked[row][order].tolist()
        assert found.ids[row].tolist() == ids[order].tolist()


def test_what_cannot_be_mined_is_refused(tmp_path: Path) -> None:
    three, _ = corpora(tmp_path)
    for settings, sentence in (
        ({"ranks": (0, 5)}, "first rank must be at least 1"),
        ({"ranks": (9, 5)}, "first rank must be at least 1"),
        ({"require": 9, "count": 3}, r"require \(9\) must not be above count \(3\)"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            build_plan(three, [Planted(), *parse_stages([{"mine": settings}])], "o", 0)
    plan = build_plan(three, [Planted(), named(Mine(), "mine")], "o", 0)
    assert carried(plan, WriteConfig(replace={"negatives": "mined_texts"})) == ["mined_count"]
    with pytest.raises(ConfigError, match="no stage writes texts 'mined_ranks' to put in the place of 'negatives'"):
        carried(plan, WriteConfig(replace={"negatives": "mined_ranks"}))
    with pytest.raises(ConfigError, match=r"'anchor_embedding' holds fixed_size_list.*numbers, text or lists"):
        carried(plan, parse_config(WriteConfig, {"columns": ["anchor_embedding"]}, "x"))
