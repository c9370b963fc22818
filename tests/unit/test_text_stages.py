"""Text stages against plain Python, on the captions that ship with Clew and on texts made to be found."""

from __future__ import annotations

import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import ftfy
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl.config import parse_config
from cl.corpus import Corpus, text_pair_content
from cl.errors import ConfigError
from pipelines.curate import CurateConfig, curate
from pipelines.keyed import keyed_hash
from pipelines.stages.boilerplate import Boilerplate
from pipelines.stages.clean_text import repaired
from tests.curation_corpora import Sample, image_corpus, picture, run_plan, text_corpus

SAMPLE = Path(__file__).resolve().parents[2] / "pipelines" / "sample"


@lru_cache(maxsize=1)
def captions() -> tuple[str, ...]:
    """Real captions, noise and all."""
    texts = []
    for path in sorted((SAMPLE / "train").glob("*.tar")):
        with tarfile.open(path, ignore_zeros=True) as tar:
            try:
                for member in tar:
                    file = tar.extractfile(member) if member.name.endswith(".txt") else None
                    texts.append(file.read().decode("utf-8", "replace") if file else "")
            except tarfile.ReadError:
                continue  # one shard is damaged on purpose
    return tuple(text for text in texts if text)


ODD = (
    "", "   ", "aaaaaaaaaaaaa!", "wow wow wow wow wow wow wow wow wow", "the cat sat the cat sat the cat sat on it",
    "SHOUTED WORDS", "12 34 56 78", "!?!?!?", "tab\there\nline", "bad \ufffd decoding", "zero\u200dwidth 👩\u200d🔬",
    "\ue000 private", "漢字の題名", "Ünïcödé É", "--------------", "no!? (yes) -- oh!", "abcd 123456",
    "ends in zzzz", "zzzzzz begins",
)  # fmt: skip


def corpus_of(root: Path, texts: Sequence[str], cuts: Sequence[int] = ()) -> Corpus:
    image = picture(0, 8, 8)
    samples = [Sample(str(i), text, image) for i, text in enumerate(texts)]
    return image_corpus(root, [samples[a:b] for a, b in zip([0, *cuts], [*cuts, len(samples)], strict=True)])


def judged(tmp_path: Path, texts: Sequence[str], stage: Any) -> list[dict[str, Any]]:
    return run_plan(corpus_of(tmp_path / "c", texts), tmp_path / "o", [stage]).to_pylist()


def test_characters_are_counted_as_unicode_says(tmp_path: Path) -> None:
    texts = [*captions()[:1500], *ODD]
    limits = {"min_letters": 0.4, "max_digits": 0.5, "max_signs": 0.3, "max_capitals": 0.8}
    rows = judged(tmp_path, texts, {"characters": limits})
    seen: Counter[str | None] = Counter()
    for text, row in zip(texts, rows, strict=True):
        kinds = Counter()  # type: ignore[var-annotated]
        for char in text:
            category = unicodedata.category(char)
            if char.isspace() or category[0] == "Z":
                continue
            kinds["all"] += 1
            kinds["letters"] += category[0] in "LM"
            kinds["capitals"] += category in ("Lu", "Lt")
            kinds["digits"] += category[0] == "N"
            kinds["unwanted"] += char == "\ufffd" or category in ("Cc", "Co", "Cn", "Cs")
            kinds["signs"] += category[0] in "PS" and char != "\ufffd"
        total = max(kinds["all"], 1)
        shares = {name: kinds[name] / total for name in ("letters", "digits", "signs")}
        shares["capitals"] = kinds["capitals"] / max(kinds["letters"], 1)
        for name, share in shares.items():
            assert row[f"text_{name}"] == pytest.approx(share, abs=1e-6), text
        reason = next(
            (
                name
                for name, bad in {
                    "unwanted_characters": kinds["unwanted"] > 0,
                    "too_few_letters": shares["letters"] < 0.4 and kinds["all"] > 0,
                    "too_many_digits": shares["digits"] > 0.5,
                    "too_many_signs": shares["signs"] > 0.3,
                    "too_many_capitals": shares["capitals"] > 0.8,
                }.items()
                if bad
            ),
            None,
        )
        assert row["drop_reason"] == reason, text
        seen[reason] += 1
    assert len(seen) == 6, "every reason occurs"


def test_repetitions_are_those_of_lists_and_counters(tmp_path: Path) -> None:
    texts = [*captions()[:1500], *ODD]
    rows = judged(tmp_path, texts, {"repetition": {"min_words": 5, "max_words": 0.5, "max_phrases": 0.3}})
    seen: Counter[str | None] = Counter()
    for text, row in zip(texts, rows, strict=True):
        words = re.findall(r"\w+", text.lower())
        if re.search(r"[\u3040-\u9fff]", text):
            words = list(text)  # written without spaces: every character is a word
        phrases = [tuple(words[i : i + 3]) for i in range(max(len(words) - 2, min(len(words), 1)))]
        repeated = [1 - len(set(each)) / max(len(each), 1) if each else 0.0 for each in (words, phrases)]
        run = max((len(list(run)) for char, run in groupby(text) if not char.isspace()), default=0)
        assert row["text_repeated_words"] == pytest.approx(repeated[0], abs=1e-6), text
        assert row["text_repeated_phrases"] == pytest.approx(repeated[1], abs=1e-6), text
        assert row["text_longest_run"] == run, text
        enough = len(words) >= 5
        reason = "repeated_words" if enough and repeated[0] > 0.5 else None
        reason = reason or ("repeated_phrases" if enough and repeated[1] > 0.3 else None)
        assert row["drop_reason"] == (reason or ("repeated_character" if run > 8 else None)), text
        seen[row["drop_reason"]] += 1
    assert len(seen) == 4


BOILERPLATE = {
    "a red house near www.example.org": "address",
    "write to jane.doe+x@mail.example.com": "address",
    "see https://example.org/a/b?c=d for all the details of this long and honest description of a red house": "address",
    "a red house on a hill by a lake, painted by a boy of ten, from example.org": None,
    "IMG_20190412_1": "file_name",
    "DSC0001": "file_name",
    "red-house (2).JPG": "file_name",
    "image": "file_name",
    "image of a red house": None,
    "p 51 mustang": None,
    "<b>bold</b> house": "markup",
    "fish &amp; chips": "markup",
    "fish & chips; 3 < 4 > 2": None,
    "Click to enlarge": "boilerplate",
    "No image available": "boilerplate",
    "© 2020, All Rights Reserved.": "boilerplate",
    "a picture of the unavailable": None,
    "": None,
}


def test_boilerplate_by_its_patterns(tmp_path: Path) -> None:
    rows = judged(tmp_path, list(BOILERPLATE), "boilerplate")
    assert dict(zip(BOILERPLATE, [row["drop_reason"] for row in rows], strict=True)) == BOILERPLATE
    rows = judged(tmp_path / "2", captions()[:1500], "boilerplate")
    good = sum(row["drop_reason"] is None for row in rows)
    assert good > 0.9 * len(rows), "captions that people wrote stay"


def test_a_phrase_that_is_no_expression_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"phrase '\(open' is no regular expression"):
        parse_config(Boilerplate, {"phrases": ["(open"]}, "x")


def test_templates_keep_their_first_samples_by_coin(tmp_path: Path) -> None:
    texts = [f"Photo {i} of 250" for i in range(40)] + [f"Lot {i}/17:  PLATE, {i}.5 x 20,5 cm" for i in range(6)]
    texts += list(captions()[:300])
    corpus = corpus_of(tmp_path / "c", texts, [10, 44])
    rows = run_plan(corpus, tmp_path / "o", [{"caption_template": {"max_texts": 5}}], seed=3, partitions=4).to_pylist()

    def template(text: str) -> str:
        return " ".join(re.sub(r"\d+(?:[.,:/ -]\d+)*", "0", text.lower()).split())

    groups: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        groups.setdefault(template(text), []).append(i)
    assert len(groups["photo 0 of 0"]) == 40
    assert len(groups["lot 0: plate, 0 x 0 cm"]) == 6
    coins = keyed_hash(3, [row["id"] for row in rows], "caption_template").tolist()
    for members in groups.values():
        kept = sorted(members, key=lambda i: (coins[i], rows[i]["id"]))[:5]
        for i in members:
            assert rows[i]["template_count"] == len(members)
            assert rows[i]["drop_reason"] == (None if i in kept else "template_over_cap")


def test_repair_is_ftfys_and_what_it_cannot_change_is_left_out() -> None:
    broken = [
        "schÃ¶n",
        "fish &amp; chips",
        "ﬁne",
        "plain",
        "crlf\r\nend",
        "â€œquotedâ€\x9d",
        "\x1b[31mred",
        "",
        "ok \ufffd",
    ]
    texts = [*captions()[:2000], *broken]
    expected = [ftfy.fix_text(text) for text in texts]
    assert repaired(pl.Series(texts)).to_list() == expected
    assert sum(a != b for a, b in zip(texts, expected, strict=True)) >= 5


@given(st.text(alphabet=[chr(code) for code in (10, *range(32, 127)) if chr(code) != "&"], max_size=60))
@settings(max_examples=500, deadline=None)
def test_ftfy_leaves_plain_texts_alone(text: str) -> None:
    assert ftfy.fix_text(text) == text


PERSONAL = {
    "mail jane.doe+x@mail.example.com now": ("mail <email> now", 1),
    "call +49 30 901820, or (555) 123-4567": ("call <phone>, or <phone>", 2),
    "555-123-4567 and 555.123.4567": ("<phone> and <phone>", 2),
    "host 192.168.10.254 or 2001:db8::ff00:42:8329 or fe80:0:0:0:200:f8ff:fe21:67cf": ("host <ip> or <ip> or <ip>", 3),
    "12-05-2020, 10:30, 3.14159, 256.1.1.999": ("12-05-2020, 10:30, 3.14159, 256.1.1.999", 0),
    "ISBN 978-3-16-148410-0 costs 1234567890": ("ISBN 978-3-16-148410-0 costs 1234567890", 0),
    "a  b\n c\u00a0 ": ("a b c", 0),
    "schÃ¶n &amp; gut": ("schön & gut", 0),
}


def test_personal_data_are_replaced_by_marks(tmp_path: Path) -> None:
    rows = judged(tmp_path, list(PERSONAL), {"clean_text": {"max_marks": 2}})
    assert [(row["text_clean"], row["text_marks"]) for row in rows] == list(PERSONAL.values())
    assert [row["text"] for row in rows] == list(PERSONAL), "the corpus's own text stays"
    assert [row["drop_reason"] for row in rows] == [
        "personal_data" if marks > 2 else None for _, marks in PERSONAL.values()
    ]


def test_marks_are_taken_literally_and_null_leaves_a_kind_alone(tmp_path: Path) -> None:
    text = "a@example.org 10.0.0.1"
    rows = judged(tmp_path, [text], {"clean_text": {"email": "$0{x}", "ip": None}})
    assert (rows[0]["text_clean"], rows[0]["text_marks"]) == ("$0{x} 10.0.0.1", 1)


def test_a_text_of_which_nothing_is_left_is_dropped(tmp_path: Path) -> None:
    rows = judged(tmp_path, ["\u200b \u00a0", "x", "a@b.cd"], {"clean_text": {"email": ""}})
    assert [row["drop_reason"] for row in rows][1:] == [None, "empty_text"]


def test_length_ratio_of_pairs(tmp_path: Path) -> None:
    glosses = pq.read_table(SAMPLE / "text" / "train.parquet").slice(0, 400).to_pylist()
    pairs = [(row["query"] or "", row["positive"] or "") for row in glosses] + [("", ""), ("x", "y" * 400)]
    corpus = text_corpus(tmp_path / "c", [pairs[:100], pairs[100:]])
    stage = {"length_ratio": {"max_ratio": 1.2, "max_positive": 4.0, "slack": 5}}
    rows = run_plan(corpus, tmp_path / "o", [stage]).to_pylist()
    reasons = set()
    for (anchor, positive), row in zip(pairs, rows, strict=True):
        a, b = (len("".join(text.split())) + 5 for text in (anchor, positive))
        assert row["length_ratio"] == pytest.approx(max(a, b) / min(a, b), rel=1e-6)
        assert row["drop_reason"] == ("length_ratio" if b / a > 4 or a / b > 1.2 else None)
        reasons.add(row["drop_reason"])
    assert len(reasons) == 2


def test_both_texts_of_a_pair_are_judged(tmp_path: Path) -> None:
    pairs = [("a red house", "ein rotes Haus"), ("a red house", "12345"), ("www.example.org", "a house"), ("", "x")]
    corpus = text_corpus(tmp_path / "c", [pairs])
    stages = [{"characters": {"max_digits": 0.5}}, "repetition", "boilerplate", "clean_text"]
    rows = run_plan(corpus, tmp_path / "o", stages).to_pylist()
    assert [row["drop_reason"] for row in rows] == [None, "too_many_digits", "address", "empty_text"]


@pytest.mark.parametrize(
    ("replace", "sentence"),
    [
        ({"caption": "text_clean"}, "'caption' is no text of this corpus; its texts are text"),
        ({"text": "clean"}, "no stage writes a text 'clean' to put in the place of 'text'"),
        ({"text": "text_marks"}, "no stage writes a text 'text_marks'"),
    ],
)
def test_a_replacement_that_is_not_there_is_refused(tmp_path: Path, replace: dict[str, str], sentence: str) -> None:
    corpus_of(tmp_path / "c", ["a"])
    tree = {"corpus": str(tmp_path / "c"), "out": str(tmp_path / "o"), "stages": ["clean_text"]}
    with pytest.raises(ConfigError, match=sentence):
        curate(parse_config(CurateConfig, tree | {"write": {"replace": replace}}, "x"))


def test_the_curated_corpus_has_the_clean_texts(tmp_path: Path, ray_session: None) -> None:
    texts = ["mail a@b.cd", "a  house", "schÃ¶n"]
    corpus_of(tmp_path / "images", texts)
    pairs = [("mail a@b.cd", "one"), ("mail c@d.ef", "one"), ("other", "two")]
    text_corpus(tmp_path / "pairs", [pairs])
    for kind, names in (("images", ["text"]), ("pairs", ["anchor", "positive"])):
        replace = {name: f"{name}_clean" for name in names}
        tree = {"corpus": str(tmp_path / kind), "out": str(tmp_path / f"{kind}-out"), "stages": ["clean_text"]}
        curate(parse_config(CurateConfig, tree | {"write": {"replace": replace}}, "x"))
    images = pa.concat_tables(pq.read_table(path) for path in (tmp_path / "images-out" / "samples").iterdir())
    assert sorted(images["text"].to_pylist()) == ["a house", "mail <email>", "schön"]
    with tarfile.open(next((tmp_path / "images-out" / "shards").iterdir())) as tar:
        found = {tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")}  # type: ignore[union-attr]
    assert found == {"a house", "mail <email>", "schön"}
    rows = pq.read_table(tmp_path / "pairs-out" / "samples" / "00000.parquet").to_pylist()
    assert sorted(row["anchor"] for row in rows) == ["mail <email>", "mail <email>", "other"]
    for row in rows:
        assert row["content"] == text_pair_content(row["anchor"], row["positive"])
    same = {row["lane"] for row in rows if row["anchor"] != "other"}
    assert len(same) == 1, "what is equal now shares a lane"
