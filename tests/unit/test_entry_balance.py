"""MetaCLIP's matching and balance against substrings, counters and products, on the glosses that ship with Clew."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cl.corpus import Corpus
from cl.errors import ConfigError, DataError
from pipelines.keyed import id_words
from pipelines.plan import build_plan, parse_stages
from pipelines.stages.entry_balance import coins, largest_t, tail_share
from tests.curation_corpora import Sample, column_of, image_corpus, picture, run_plan

SAMPLE = Path(__file__).resolve().parents[2] / "pipelines" / "sample" / "text" / "train.parquet"


@lru_cache(maxsize=1)
def glosses() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """1,500 real texts, and 2,000 real entries: the lemmas of WordNet and words of the texts."""
    table = pq.read_table(SAMPLE).slice(0, 1500)
    texts = tuple(text or "" for text in table["positive"].to_pylist())
    lemmas = [lemma.strip() for query in table["query"].to_pylist() for lemma in (query or "").split(",")]
    words = [word for text in texts for word in re.findall(r"[\w'-]+", text)]
    pairs = [" ".join(text.split()[:2]) for text in texts[:300]]
    entries = dict.fromkeys([*lemmas, *words, *pairs, "a (", "it's", "C"])
    return texts, tuple([each for each in entries if each][:4000])


def pad(text: str) -> str:
    spaced = "".join(f" {char} " if unicodedata.category(char)[0] in "PS" else char for char in text.lower())
    return " " + " ".join(spaced.split()) + " "


def corpus_of(root: Path, texts: tuple[str, ...], codes: list[int] | None = None) -> Corpus:
    image = picture(0, 8, 8)
    samples = [Sample(str(i), text, image) for i, text in enumerate(texts)]
    cut = len(samples) // 3
    return image_corpus(root, [samples[:cut], samples[cut:]])


def listed(folder: Path, entries: tuple[str, ...]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "entries.txt"
    path.write_text("\n".join(["", *entries, entries[0].upper(), "  "]) + "\n")
    return str(path)


def test_entries_are_the_padded_substrings(tmp_path: Path) -> None:
    texts, entries = glosses()
    texts = (*texts, "漢字の本を読む", "(see: it's a C)", "")
    entries = (*entries, "漢字", "本を")
    corpus = corpus_of(tmp_path / "c", texts)
    stages = [{"entry_match": {"path": listed(tmp_path, entries)}}]
    table = run_plan(corpus, tmp_path / "o", stages)
    plan = build_plan(corpus, parse_stages(stages), str(tmp_path / "o"), 0)
    found = column_of(plan, "entry_match", "entries")
    wanted = list(dict.fromkeys(pad(each) for each in entries))
    for text, mine, row in zip(texts, found, table.to_pylist(), strict=True):
        whole = pad(text)
        unspaced = re.compile("[\u3040-\u9fff]")
        expected = [i for i, each in enumerate(wanted) if (each.strip() if unspaced.search(each) else each) in whole]
        assert mine == expected, text
        assert row["entry_count"] == len(expected)
        assert row["drop_reason"] == (None if expected else "no_entry")
    assert sum(map(len, found)) > 10_000
    assert {len(wanted) - 2, len(wanted) - 1} <= set(found[-3])


@pytest.mark.parametrize("t", [1, 5, 40])
def test_balance_is_that_of_counters_and_products(tmp_path: Path, t: int) -> None:
    texts, entries = glosses()
    corpus = corpus_of(tmp_path / "c", texts)
    stages: list[Any] = [{"entry_match": {"path": listed(tmp_path, entries)}}, {"entry_balance": {"t": t}}]
    rows = run_plan(corpus, tmp_path / "o", stages, seed=5).to_pylist()
    plan = build_plan(corpus, parse_stages(stages), str(tmp_path / "o"), 5)
    found = column_of(plan, "entry_match", "entries")
    rows = [row for row in rows if row["drop_reason"] != "no_entry"]
    found = [each for each in found if each]
    counts = Counter(entry for each in found for entry in each)
    for row, mine in zip(rows, found, strict=True):
        chance = [min(1.0, t / counts[entry]) for entry in mine]
        assert row["entry_probability"] == pytest.approx(1 - np.prod([1 - p for p in chance]), abs=1e-6)
        words = np.repeat(id_words([row["id"]]), len(mine), 0)
        thrown = coins(5, np.array(mine, np.int32), words)
        kept = any(coin < p for coin, p in zip(thrown.tolist(), chance, strict=True))
        assert row["drop_reason"] == (None if kept else "entry_over_cap")
    probabilities = np.array([row["entry_probability"] for row in rows])
    kept_rows = sum(row["drop_reason"] is None for row in rows)
    deviation = np.sqrt((probabilities * (1 - probabilities)).sum())
    assert abs(kept_rows - probabilities.sum()) <= 4 * deviation + 1


def test_coins_are_even_and_independent() -> None:
    ids = np.random.default_rng(0).integers(0, 2**63, (20_000, 2), dtype=np.uint64)
    one, two = (coins(0, np.full(len(ids), entry, np.int32), ids) for entry in (7, 8))
    for thrown in (one, two, coins(1, np.full(len(ids), 7, np.int32), ids)):
        assert np.abs(np.histogram(thrown, 10, (0, 1))[0] - 2000).max() < 5 * np.sqrt(2000)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03
    assert thrown.tolist() != one.tolist()


def test_a_larger_t_keeps_all_that_a_smaller_one_kept(tmp_path: Path) -> None:
    texts, entries = glosses()
    corpus = corpus_of(tmp_path / "c", texts)
    path = listed(tmp_path, entries)
    kept = []
    for t in (3, 10, 10**6):
        stages = [{"entry_match": {"path": path}}, {"entry_balance": {"t": t}}]
        table = run_plan(corpus, tmp_path / "o", stages)
        kept.append({row["id"] for row in table.to_pylist() if row["drop_reason"] is None})
    assert kept[0] < kept[1] < kept[2]
    assert len(kept[2]) == sum(row["entry_count"] > 0 for row in table.to_pylist()), "t above all counts keeps all"


def test_t_of_another_language_has_the_tail_share_of_the_reference() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        counts = rng.zipf(1.5, 200).clip(max=10_000)
        share = float(rng.random())
        t = largest_t(counts, share)
        assert tail_share(counts, t) <= share + 1e-9
        assert t == counts.max() + 1 or tail_share(counts, t + 1) > share - 1e-9
    assert largest_t(np.array([5, 5, 5]), 1.0) == 6
    assert largest_t(np.array([5, 7]), 0.0) == 5


def test_languages_are_balanced_each_by_itself(tmp_path: Path) -> None:
    english = [f"the house number {i} is red and it stands on the old street" for i in range(30)]
    english += [f"the {animal} sleeps under the old tree in the garden" for animal in ("cat", "dog", "cow", "fox")]
    german = [f"das rote Haus Nummer {i} steht an der alten Straße" for i in range(12)]
    german += [f"{tier} schläft im Garten unter dem alten Baum" for tier in ("die Katze", "der Hund", "die Kuh")]
    entries = ("house", "cat", "dog", "cow", "fox", "Haus", "Katze", "Hund", "Kuh")
    corpus = corpus_of(tmp_path / "c", tuple(english + german))
    caption = {"caption": {"languages": ["en", "de"]}}
    match = {"entry_match": {"path": listed(tmp_path, entries)}}
    balance = {"entry_balance": {"t": 10, "language": "text_language"}}
    rows = run_plan(corpus, tmp_path / "o", [caption, match, balance]).to_pylist()
    # Tail of English at 10: 4 of 34 mentions. Of German, 3 of 15 are over that, so its t is 1.
    for row in rows:
        rare = row["entry_probability"] == 1.0
        expected = 10 / 30 if row["text_language"] == "en" else 1 / 12
        assert rare or row["entry_probability"] == pytest.approx(expected, abs=1e-6)
        assert rare == any(each in row["text"] for each in ("cat", "dog", "cow", "fox", "Katze", "Hund", "Kuh"))
    with pytest.raises(DataError, match=r"no text of the reference language 'fr' is left.*there are de, en"):
        run_plan(
            corpus,
            tmp_path / "f",
            [caption, match, {"entry_balance": {"language": "text_language", "reference": "fr"}}],
        )


def test_lists_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", ("a", "b", "c"))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, sentence in (("none", "does not exist"), ("empty", "has no entry"), ("bytes", "is not UTF-8 text")):
        with pytest.raises(ConfigError, match=sentence):
            build_plan(corpus, parse_stages([{"entry_match": {"path": str(tmp_path / f"{name}.txt")}}]), "o", 0)


def test_the_key_follows_the_content_of_the_list_and_not_its_place(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", ("a", "b", "c"))

    def key(path: str) -> str:
        return build_plan(corpus, parse_stages([{"entry_match": {"path": path}}]), "o", 0).nodes[0].key

    first = key(listed(tmp_path / "1", ("house", "cat")))
    assert key(listed(tmp_path / "2", ("house", "cat"))) == first
    assert key(listed(tmp_path / "3", ("house", "dog"))) != first
