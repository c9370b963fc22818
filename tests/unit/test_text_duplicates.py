"""Near-duplicate texts against brute force over the texts that ship with Clew, and the rounds that find them."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cl.config import parse_config
from cl.corpus import Corpus, sample_id
from cl.errors import ConfigError
from pipelines.plan import Plan, Step, build_plan, parse_stages, segments
from pipelines.rounds import here, run_rounds, run_task
from pipelines.run_steps import run_steps
from pipelines.shingles import SETTLED, Words, band_keys, distinct, minhash, normalised
from pipelines.stages.keyed import Inbox
from pipelines.stages.pairwise import ENTRIES
from pipelines.stages.text_duplicate import TextDuplicate, overlaps
from tests.curation_corpora import Sample, image_corpus, picture, run_plan, text_corpus

SAMPLE = Path(__file__).resolve().parents[2] / "pipelines" / "sample" / "text" / "train.parquet"
SURE = {"bands": 64, "rows": 2}  # P(.6) = 1 - 4e-13: every pair within the threshold is a candidate


@lru_cache(maxsize=1)
def glosses() -> tuple[str, ...]:
    """Some 600 real texts of about nine words."""
    return tuple(pq.read_table(SAMPLE)["positive"].to_pylist()[:600])


@lru_cache(maxsize=1)
def varied() -> tuple[str, ...]:
    """Real texts and near copies of them: a word dropped, replaced or added, other case, other signs."""
    rng = np.random.default_rng(0)
    out = []
    for number, text in enumerate(glosses()[:260]):
        out.append(text)
        words = text.split()
        for _ in range(int(rng.integers(0, 4))):
            place = int(rng.integers(len(words)))
            change = int(rng.integers(5))
            changed = [
                [*words[:place], *words[place + 1 :]],
                [*words[:place], f"new{number}", *words[place + 1 :]],
                [*words, "indeed"],
                [word.upper() for word in words],
                [f"{word}," for word in words],
            ][change]
            out.append(" ".join(changed))
    return tuple(out[int(i)] for i in rng.permutation(len(out)))


def python_shingles(text: str, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + size]) for i in range(max(len(words) - size + 1, min(len(words), 1)))}


def python_jaccard(a: set[Any], b: set[Any]) -> float:
    return len(a & b) / len(a | b) if a and b else 0.0


def first_kept(order: Sequence[int], alike: Callable[[int, int], bool]) -> dict[int, int]:
    """Dropped row -> the first kept row that it is alike to: one loop over the order."""
    kept: list[int] = []
    dropped = {}
    for row in order:
        keeper = next((other for other in kept if alike(other, row)), None)
        if keeper is None:
            kept.append(row)
        else:
            dropped[row] = keeper
    return dropped


def test_words_are_those_of_the_regular_expression() -> None:
    texts = ["", "  ", "one", "Éa_b 12x", *glosses()]
    words = Words(pa.array(texts))
    known: dict[str, int] = {}
    for text, start, end in zip(texts, words.bounds[:-1], words.bounds[1:], strict=True):
        expected = re.findall(r"\w+", text.lower())
        assert len(expected) == end - start, text
        for word, found in zip(expected, words.hashes[start:end].tolist(), strict=True):
            assert known.setdefault(word, found) == found
    assert len(set(known.values())) == len(known) > 1000


@pytest.mark.parametrize(
    ("text", "count"), [("漢字です", 4), ("the 漢字 word", 4), ("สวัสดี", 6), ("नमस्ते दुनिया", 2), ("cafe\u0301 café", 2)]
)
def test_scripts_without_spaces_are_cut_by_character_and_marks_stay(text: str, count: int) -> None:
    words = Words(pa.array([text]))
    assert len(words.hashes) == count
    if text.startswith("cafe"):
        assert words.hashes[0] == words.hashes[1], "composed and decomposed letters are the same"


def test_only_texts_that_may_change_are_normalised() -> None:
    ranges = re.findall(r"\\x\{?([0-9A-F]+)\}?-\\x\{?([0-9A-F]+)", SETTLED)
    settled = "".join(chr(code) for first, last in ranges for code in range(int(first, 16), int(last, 16) + 1))
    assert len(settled) > 30_000
    assert unicodedata.normalize("NFKC", settled) == settled
    assert not any(unicodedata.category(char).startswith("M") for char in settled), "nothing that composes"
    texts = ["Größe", "nbsp\u00a0here", "e\u0301", "ﬁne", None, "ПРИВЕТ", "\u1100\u1161", "x²"]
    expected = [unicodedata.normalize("NFKC", text or "").lower() for text in texts]
    assert normalised(pa.array(texts)).to_pylist() == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shingles_and_jaccard_equal_python_sets(size: int) -> None:
    texts = ["", "one", "one two", "one two one two", *varied()[:300]]
    sets = [python_shingles(text, size) for text in texts]
    values, bounds = distinct(*Words(pa.array(texts)).shingles(size))
    assert np.diff(bounds).tolist() == [len(each) for each in sets]
    lists = pa.LargeListArray.from_arrays(pa.array(bounds, pa.int64()), pa.array(values))
    i, j = np.array(list(itertools.combinations(range(len(texts)), 2))).T
    expected = [python_jaccard(sets[a], sets[b]) for a, b in zip(i.tolist(), j.tolist(), strict=True)]
    np.testing.assert_allclose(overlaps(lists, i, lists, j), expected, atol=1e-12)
    assert sum(0 < each < 1 for each in expected) > 50


def test_shingles_of_characters() -> None:
    texts = ["Ab  c", "ab c", "ab\tcd", ""]
    values, bounds = distinct(*Words(pa.array(texts), "character").shingles(3))
    sets = [set(values[start:end].tolist()) for start, end in itertools.pairwise(bounds.tolist())]
    expected = [{"ab ", "b c"}, {"ab ", "b c"}, {"ab ", "b c", " cd"}, set()]
    assert [len(each) for each in sets] == [len(each) for each in expected]
    assert sets[0] == sets[1] < sets[2]


def test_digests_tell_texts_of_other_words_apart() -> None:
    texts = ["a b c", "A, b C!", "a c b", "a b", "a b c a", "", " - "]
    digests = [tuple(row) for row in Words(pa.array(texts)).digests().tolist()]
    assert digests[0] == digests[1]
    assert digests[5] == digests[6]
    assert len(set(digests)) == 5


def test_signatures_agree_as_often_as_the_sets_are_alike() -> None:
    rng = np.random.default_rng(1)
    count, entries = 60, 1024
    common = rng.integers(0, 2**63, 400, dtype=np.uint64)
    for shared in (40, 200, 360):
        sets = [np.concatenate([common[:shared], rng.integers(0, 2**63, 400 - shared, dtype=np.uint64)]) for _ in "ab"]
        values, bounds = np.concatenate(sets), np.array([0, 400, 800])
        first, second = minhash(values, bounds, entries)
        jaccard = shared / (800 - shared)
        deviation = np.sqrt(jaccard * (1 - jaccard) / entries)
        assert abs((first == second).mean() - jaccard) < 4 * deviation
    signatures = rng.integers(0, 3, (count, 8)).astype(np.uint32)
    keys = band_keys(signatures, 4)
    for a, b in itertools.product(range(count), range(count)):
        for band in range(4):
            same = bool((signatures[a, 2 * band : 2 * band + 2] == signatures[b, 2 * band : 2 * band + 2]).all())
            assert bool(keys[a, band] == keys[b, band]) == same
    assert len(np.unique(keys)) == sum(len(np.unique(signatures[:, 2 * b : 2 * b + 2], axis=0)) for b in range(4))


def corpus_of(root: Path, texts: Sequence[str], cuts: Sequence[int]) -> Corpus:
    """An image-text corpus with these captions; its images are all the same few bytes."""
    image = picture(0, 8, 8)
    samples = [
        Sample(f"{i}", text, image, {"quality": float(i * 7919 % 100), "number": i}) for i, text in enumerate(texts)
    ]
    parts = [samples[a:b] for a, b in zip([0, *cuts], [*cuts, len(samples)], strict=True)]
    return image_corpus(root, parts)


@pytest.mark.parametrize("partitions", [1, 5])
@pytest.mark.parametrize("rule", [{}, {"keep": "first"}, {"keep": "largest"}, {"best": "quality"}])
def test_what_stays_is_what_one_loop_over_all_pairs_keeps(
    tmp_path: Path, rule: dict[str, str], partitions: int
) -> None:
    texts = [*varied(), "", " -- ", ""]
    corpus = corpus_of(tmp_path / "c", texts, [40, 41, 250])
    stage = {"threshold": 0.6, **SURE, **rule}
    table = run_plan(corpus, tmp_path / "o", [{"text_duplicate": stage}], partitions=partitions)
    rows = table.to_pylist()
    sets = [python_shingles(text, 3) for text in texts]
    rank: dict[str, Callable[[int], Any]] = {
        "first": lambda i: i,
        "largest": lambda i: (-len(texts[i]), rows[i]["id"]),
        "quality": lambda i: (-rows[i]["quality"], rows[i]["id"]),
        "id": lambda i: rows[i]["id"],
    }
    order = sorted(range(len(texts)), key=rank[next(iter(rule.values()), "id")])
    expected = first_kept(order, lambda a, b: python_jaccard(sets[a], sets[b]) >= 0.6)
    assert 200 < len(expected) < len(texts) - 200
    for i, row in enumerate(rows):
        keeper = expected.get(i)
        assert row["drop_reason"] == (None if keeper is None else "text_duplicate"), texts[i]
        assert row["text_duplicate_of"] == (None if keeper is None else rows[keeper]["id"])
        if keeper is not None:
            assert row["text_duplicate_jaccard"] == pytest.approx(python_jaccard(sets[i], sets[keeper]))


def test_the_default_bands_find_what_they_promise(tmp_path: Path) -> None:
    texts = varied()
    corpus = corpus_of(tmp_path / "c", texts, [100])
    rows = run_plan(corpus, tmp_path / "o", ["text_duplicate"]).to_pylist()
    kept = [i for i, row in enumerate(rows) if row["drop_reason"] is None]
    sets = [python_shingles(text, 3) for text in texts]
    pairs = sum(python_jaccard(a, b) >= 0.8 for a, b in itertools.combinations(sets, 2))
    missed = sum(python_jaccard(sets[a], sets[b]) >= 0.8 for a, b in itertools.combinations(kept, 2))
    assert pairs > 100
    assert missed <= 0.02 * pairs
    place = {row["id"]: i for i, row in enumerate(rows)}
    for i, row in enumerate(rows):
        if row["drop_reason"]:
            keeper = place[row["text_duplicate_of"]]
            assert rows[keeper]["drop_reason"] is None, "nothing hangs on a dropped row"
            assert python_jaccard(sets[i], sets[keeper]) >= 0.8


@pytest.mark.parametrize("partitions", [1, 2, 7])
def test_a_chain_of_likenesses_loses_every_other_link(tmp_path: Path, partitions: int) -> None:
    """Ten words of a long text, moved on by one: neighbours have J = 9/11, the next but one 8/12.

    Each row waits for the one before it, over all partitions: no order is harder for decisions made in parallel.
    """
    texts = [" ".join(f"w{i + k}" for k in range(10)) for i in range(60)]
    corpus = corpus_of(tmp_path / "c", texts, [20, 40])
    stage = {"threshold": 0.8, "shingle": 1, "keep": "first", **SURE}
    rows = run_plan(corpus, tmp_path / "o", [{"text_duplicate": stage}], partitions=partitions).to_pylist()
    assert [row["drop_reason"] for row in rows] == [None, "text_duplicate"] * 30
    assert [row["text_duplicate_of"] for row in rows[1::2]] == [row["id"] for row in rows[::2]]


def test_a_crowd_that_shares_its_keys_meets_its_first_members(tmp_path: Path) -> None:
    """With `max_bucket` 3 and 300 rows in one bucket, three families of near copies still leave one row each."""
    base = [[f"{family}{k}" for k in range(30)] for family in "abc"]
    texts = [" ".join([*base[i % 3], f"tail{i}"]) for i in range(300)]
    corpus = corpus_of(tmp_path / "c", texts, [150])
    stage = {"threshold": 0.8, "shingle": 1, "keep": "first", "max_bucket": 3, **SURE}
    rows = run_plan(corpus, tmp_path / "o", [{"text_duplicate": stage}]).to_pylist()
    assert [i for i, row in enumerate(rows) if row["drop_reason"] is None] == [0, 1, 2]


@pytest.mark.parametrize("cap", [1, 2, 99])
def test_pairs_of_a_bucket_are_all_or_those_with_its_first_rows(cap: int) -> None:
    key = np.array([5, 9, 5, 5, 9, 7, 9, 5], np.uint64)  # 4 rows share one key, 3 another
    ref = np.arange(8)
    rank = np.array([3, 0, 1, 2, 0, 0, 0, 0.5])
    id0 = np.array([0, 8, 0, 0, 6, 0, 7, 0], np.uint64)
    table = pa.table([key, ref, rank, id0, np.zeros(8, np.uint64)], schema=ENTRIES)
    inbox = Inbox(0, {"entries": table}, 1, None, "image-text", 0, 1, lambda stream, task: table)  # type: ignore[arg-type]
    found = TextDuplicate(max_bucket=cap)._pair(inbox)["pairs"].table
    pairs = set(zip(found["u"].to_pylist(), found["v"].to_pylist(), strict=True))
    buckets = [[7, 2, 3, 0], [4, 6, 1]]  # in the order (rank, id)
    wanted = {(b[i], b[j]) for b in buckets for i in range(min(cap, len(b))) for j in range(i + 1, len(b))}
    assert pairs == wanted
    assert len(pairs) == found.num_rows


def test_sources_in_order_of_preference(tmp_path: Path) -> None:
    pairs = [
        ("one two three four", "five six"),
        ("ONE two three four", "five, six"),
        ("other words here", "altogether"),
    ]
    corpus = text_corpus(tmp_path / "c", [pairs])
    path = tmp_path / "c" / "samples" / "00000.parquet"
    table = pq.read_table(path)
    sources = pa.array(["web", "books", "web"])
    pq.write_table(table.set_column(table.schema.get_field_index("source"), "source", sources), path)
    for order, kept in ((["web", "books"], [0, 2]), (["books"], [1, 2])):
        out = tmp_path / "-".join(order)
        rows = run_plan(corpus, out, [{"text_duplicate": {"sources": order}}]).to_pylist()
        assert [i for i, row in enumerate(rows) if row["drop_reason"] is None] == kept
    assert table["id"][0].as_py() == sample_id("test", "0-0")


def test_two_rules_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="give one of keep, best and sources"):
        parse_config(TextDuplicate, {"keep": "largest", "best": "score"}, "x")


def node_files(plan: Plan) -> dict[str, bytes]:
    folder = Path(plan.folder(0, "rows"))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make_plan(corpus: Corpus, out: Path, partitions: int = 3) -> Plan:
    return build_plan(corpus, parse_stages([{"text_duplicate": {"shingle": 2}}]), str(out), 0, None, partitions)


def columns_of(plan: Plan) -> pa.Table:
    files = [plan.file(Step(0, "apply"), number) for number in range(len(plan.corpus.fragments))]
    return pa.concat_tables(pq.read_table(file) for file in files).replace_schema_metadata(None)


def test_stopped_after_any_number_of_tasks_it_ends_the_same(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", varied()[:120], [30, 70])
    partial, apply = segments(make_plan(corpus, tmp_path / "whole"))

    def finish(plan: Plan) -> pa.Table:
        for number in range(3):
            run_steps(plan, partial, number, {})
        run_rounds(plan, 0, here(plan, 0))
        for number in range(3):
            run_steps(plan, apply, number, {})
        return columns_of(plan)

    whole = finish(make_plan(corpus, tmp_path / "whole"))
    assert whole["drop"].null_count < len(whole)
    left = Path(make_plan(corpus, tmp_path / "whole").folder(0, "shuffle-3"))
    assert sorted(path.name for path in left.iterdir()) == ["partial", "verdicts"], (
        "after the commit the rest is deleted"
    )

    class StoppedError(Exception):
        pass

    def stopping(plan: Plan, after: int) -> Callable[[Sequence[tuple[int, int, int]]], Iterator[float]]:
        done = 0

        def run(tasks: Sequence[tuple[int, int, int]]) -> Iterator[float]:
            nonlocal done
            for task in reversed(tasks):  # another order of arrival as well
                if done == after:
                    raise StoppedError
                done += 1
                yield run_task(plan, 0, *task)

        return run

    for after in itertools.count():
        plan = make_plan(corpus, tmp_path / f"stopped{after}")
        for number in range(3):
            run_steps(plan, partial, number, {})
        try:
            run_rounds(plan, 0, stopping(plan, after))
        except StoppedError:
            assert not plan.reduced(0)
            assert finish(plan).equals(whole)
        else:
            break
    assert after > 12


def test_partitions_change_neither_keys_nor_results(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", [*varied()[:200], "one", "two", "", *varied()[200:210]], [90, 200, 203])
    stages = [{"caption": {"min_words": 2}}, {"text_duplicate": {"shingle": 2}}, "exact_duplicate"]
    tables = [run_plan(corpus, tmp_path / f"o{p}", stages, partitions=p) for p in (1, 4, 11)]
    assert tables[0]["drop_reason"].to_pylist()[200:203] == ["too_few_words"] * 2 + ["empty_caption"], "a part is empty"
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    again = run_plan(corpus, tmp_path / "o4", stages, partitions=2)
    assert again.equals(tables[0])
    keys = [{path.name for path in (tmp_path / f"o{p}" / ".nodes").iterdir()} for p in (1, 4, 11)]
    assert keys[0] == keys[1] == keys[2]
