"""Every stage against a brute-force answer."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn

from pipelines.heavy import UndecodableError, decode, read_ranges
from pipelines.keyed import id_text, id_words, keyed_hash
from pipelines.stages import semantic_duplicate
from pipelines.stages.balance import quotas
from pipelines.stages.caption import detect
from pipelines.stages.near_duplicate import hamming_keys
from pipelines.stages.perceptual_hash import average_to, perceptual_hash
from pipelines.stages.semantic_duplicate import greedy_duplicates
from tests.curation_corpora import Sample, image_corpus, picture, run_plan, text_corpus


def drops(table: pa.Table) -> dict[str, str | None]:
    return dict(zip(table["key"].to_pylist(), table["drop_reason"].to_pylist(), strict=True))


def test_caption_words_characters_and_language(tmp_path: Path) -> None:
    captions = {
        "empty": "   ",
        "one": "house",
        "good": "a small red house on the hill",
        "shouted": "A SMALL RED HOUSE ON THE HILL",
        "german": "ein kleines rotes Haus auf dem Hügel",
        "long": "word " * 40,
        "spaces": "  two   words  ",
        "signs": "12 34 56",
    }
    corpus = image_corpus(tmp_path / "c", [[Sample(key, text, picture(0)) for key, text in captions.items()]])
    stage = {"min_words": 2, "max_chars": 100, "languages": ["en"], "min_language_score": 0.3, "min_language_chars": 12}
    table = run_plan(corpus, tmp_path / "o", [{"caption": stage}])
    assert drops(table) == {
        "empty": "empty_caption",
        "one": "too_few_words",
        "good": None,
        "shouted": None,
        "german": "other_language",
        "long": "too_many_characters",
        "spaces": None,
        "signs": None,  # too short to be judged
    }
    assert table["text_words"].to_pylist() == [len(text.split()) for text in captions.values()]
    assert table["text_chars"].to_pylist() == [len(text.strip()) for text in captions.values()]
    assert table["text_language"].to_pylist()[4] == "de"


def test_another_language_goes_only_if_it_is_sure(tmp_path: Path) -> None:
    texts = ["ein kleines rotes Haus auf dem Hügel", "chien rouge", "a small red house"]
    corpus = image_corpus(tmp_path / "c", [[Sample(text, text, picture(0)) for text in texts]])
    table = run_plan(corpus, tmp_path / "o", [{"caption": {"languages": ["en"], "min_other_score": 0.7}}])
    codes, scores = table["text_language"].to_pylist(), table["text_language_score"].to_pylist()
    assert [code != "en" and score >= 0.7 for code, score in zip(codes, scores, strict=True)] == [True, False, False]
    assert table["drop_reason"].to_pylist() == ["other_language", None, None]


def test_languages_of_known_sentences() -> None:
    sentences = {
        "en": "The quick brown fox jumps over the lazy dog",
        "fr": "Le petit chat est assis sur la table de la cuisine",
        "es": "Me gusta mucho caminar por la playa en verano",
        "ja": "私は毎日学校に行きます",
    }
    for code, text in sentences.items():
        found, score = detect(text)
        assert (found, 0.5 < score <= 1) == (code, True)
    assert detect("12 -- !") == ("", 0.0)


def test_caption_judges_both_texts_of_a_pair(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path / "c", [[("one two", "three four"), ("one", "two three"), ("one two", "")]])
    table = run_plan(corpus, tmp_path / "o", [{"caption": {"min_words": 2}}])
    assert table["drop_reason"].to_pylist() == [None, "too_few_words", "empty_caption"]
    assert table["positive_words"].to_pylist() == [2, 2, 0]


@given(width=st.integers(1, 500), height=st.integers(1, 500))
@settings(max_examples=200, deadline=None)
def test_image_size_rule(width: int, height: int) -> None:
    from pipelines.stages.base import Rows
    from pipelines.stages.image_size import ImageSize

    table = pa.table({"width": pa.array([width], pa.int32()), "height": pa.array([height], pa.int32())})
    rows = Rows(table, np.array([0], np.int32), 0, None)  # type: ignore[arg-type]
    output = ImageSize(min_side=32, max_side=400, max_aspect=3).run(rows)
    reason = None
    if min(width, height) < 32:
        reason = "image_too_small"
    elif max(width, height) > 400:
        reason = "image_too_large"
    elif max(width, height) / min(width, height) > 3:
        reason = "aspect_too_long"
    assert output.drop is not None
    assert output.drop[0] == reason


@pytest.mark.parametrize("best", [None, "quality"])
def test_exact_duplicates_against_a_dictionary(tmp_path: Path, best: str | None) -> None:
    rng = np.random.default_rng(1)
    fragments = [
        [
            Sample(f"{f}-{i}", "a", picture(int(rng.integers(8)), 16, 16), {"quality": float(rng.integers(3))})
            for i in range(15)
        ]
        for f in range(3)
    ]
    corpus = image_corpus(tmp_path / "c", fragments)
    table = run_plan(corpus, tmp_path / "o", [{"exact_duplicate": {"best": best}}])
    rows = table.to_pylist()
    kept: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (-row["quality"], row["id"])) if best else rows:
        kept.setdefault(row["content"], row)
    for row in rows:
        keeper = kept[row["content"]]
        assert (row["drop_reason"] is None) == (row["id"] == keeper["id"])
        assert row["exact_duplicate_of"] == (None if row["id"] == keeper["id"] else keeper["id"])


@given(
    base=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12),
    flips=st.lists(st.tuples(st.integers(0, 11), st.lists(st.integers(0, 63), max_size=12)), max_size=40),
    distance=st.integers(0, 10),
    count=st.sampled_from([10, 10**5, 10**7, 10**9]),
)
@settings(max_examples=150, deadline=None)
def test_hashes_within_the_distance_share_a_key(
    base: list[int], flips: list[tuple[int, list[int]]], distance: int, count: int
) -> None:
    values = set(base)
    for index, bits in flips:
        value = base[index % len(base)]
        for bit in bits:
            value ^= 1 << bit
        values.add(value)
    hashes = np.array(sorted(values), np.uint64)
    keys = hamming_keys(hashes, distance, count)
    for i, j in itertools.combinations(range(len(hashes)), 2):
        if int(hashes[i] ^ hashes[j]).bit_count() <= distance:
            assert set(keys[i].tolist()) & set(keys[j].tolist())


def test_strangers_seldom_share_a_key() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**63, 200_000, dtype=np.uint64) * np.uint64(2)
    for column in hamming_keys(hashes, 4, len(hashes)).T:
        assert np.unique(column, return_counts=True)[1].max() < 60


def look_alikes(tmp_path: Path, cuts: list[int]) -> tuple[pa.Table, list[Sample]]:
    """The near-duplicate stage over originals and re-encoded copies, cut into fragments at `cuts`."""
    samples = []
    for seed in range(6):
        samples += [
            Sample(f"{seed}-original", "a", picture(seed)),
            Sample(f"{seed}-again", "a", picture(seed, quality=60)),
            Sample(f"{seed}-larger", "a", picture(seed, 96, 96)),
            Sample(f"{seed}-png", "a", picture(seed, form="png")),
        ]
    parts = [samples[start:end] for start, end in zip([0, *cuts], [*cuts, len(samples)], strict=True)]
    corpus = image_corpus(tmp_path / "c", parts)
    return run_plan(corpus, tmp_path / "o", [{"near_duplicate": {"max_distance": 6, "max_difference": 30}}]), samples


def test_look_alikes_lose_all_but_one_whatever_the_fragments(tmp_path: Path) -> None:
    whole, samples = look_alikes(tmp_path / "whole", [])
    parts, _ = look_alikes(tmp_path / "parts", [5, 6, 17])
    kept = sorted(key for key, reason in drops(whole).items() if reason is None)
    assert [key.split("-")[0] for key in kept] == [str(seed) for seed in range(6)]
    assert drops(parts) == drops(whole)
    rows = {row["id"]: row for row in whole.to_pylist()}
    images = {sample.key: sample.image for sample in samples}
    for row in rows.values():
        if row["drop_reason"] is not None:
            keeper = rows[row["near_duplicate_of"]]
            assert keeper["drop_reason"] is None, "nothing hangs on a dropped row"
            mine, other = (perceptual_hash(decode(images[each["key"]])) for each in (row, keeper))
            assert (mine[0] ^ other[0]).bit_count() == row["near_duplicate_distance"] <= 6
            thumbnails = [np.frombuffer(each[1], np.uint8).astype(int) for each in (mine, other)]
            assert np.abs(thumbnails[0] - thumbnails[1]).max() <= 30


def test_the_same_drawing_in_another_colour_is_no_duplicate(tmp_path: Path) -> None:
    def disc(colour: str) -> bytes:
        image = Image.new("RGB", (64, 64), "white")
        image.paste(colour, (16, 16, 48, 48))
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return buffer.getvalue()

    flat = [Sample(f"flat {colour}", "a", _flat(colour)) for colour in ("white", "black", "red")]
    samples = [Sample(colour, "a", disc(colour)) for colour in ("red", "green", "blue")]
    corpus = image_corpus(tmp_path / "c", [[*samples, *flat, Sample("flat again", "a", _flat("#fefefe"))]])
    dropped = drops(run_plan(corpus, tmp_path / "o", ["near_duplicate"]))
    assert [key for key, reason in dropped.items() if reason] in (["flat white"], ["flat again"])


def test_small_marks_on_white_are_not_alike(tmp_path: Path) -> None:
    def mark(box: tuple[int, int, int, int]) -> bytes:
        image = Image.new("RGB", (64, 64), "white")
        image.paste("black", box)
        buffer = io.BytesIO()
        image.save(buffer, "png")
        return buffer.getvalue()

    # One in the middle, one a little longer: the hash and the mean difference take them for the same.
    images = [mark((30, 30, 34, 34)), mark((26, 30, 38, 34))]
    first, second = (perceptual_hash(decode(image)) for image in images)
    assert (first[0] ^ second[0]).bit_count() <= 10
    samples = [Sample(str(i), "a", image) for i, image in enumerate(images)]
    corpus = image_corpus(tmp_path / "c", [samples])
    table = run_plan(corpus, tmp_path / "o", [{"near_duplicate": {"max_distance": 10}}])
    assert table["drop_reason"].to_pylist() == [None, None]


def _flat(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 40), colour).save(buffer, "jpeg")
    return buffer.getvalue()


@given(seed=st.integers(0, 10_000), height=st.integers(1, 90), width=st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_perceptual_hash_against_scipy(seed: int, height: int, width: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    # Averaging areas = repeating every pixel until sizes divide, then averaging blocks.
    tall = np.repeat(np.repeat(pixels.astype(np.float64), 32, 0), 32, 1)
    small = tall.reshape(32, height, 32, width, 3).mean((1, 3))
    np.testing.assert_allclose(average_to(pixels.astype(np.float32), 32), small, atol=1e-2)
    frequencies = dctn(small @ [0.299, 0.587, 0.114], norm="ortho")[:8, :8].ravel()
    value, _ = perceptual_hash(pixels)
    median = np.median(np.rint(frequencies[1:]))
    for bit, frequency in enumerate(frequencies):
        if bit and abs(frequency - median) > 1.01:  # a bit is free where rounding decides
            assert bool(value >> (63 - bit) & 1) == (frequency > median)
    assert value >> 63 == 1


def test_quotas_are_the_fairest_that_meet_the_target() -> None:
    @given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=20), target=st.integers(0, 400))
    @settings(max_examples=300, deadline=None)
    def check(sizes: list[int], target: int) -> None:
        kept = quotas(np.array(sizes, np.int64), target)
        assert kept.sum() == min(target, sum(sizes))
        assert all(0 <= k <= n for k, n in zip(kept, sizes, strict=True))
        cut = [k for k, n in zip(kept, sizes, strict=True) if k < n]
        if cut:  # every cluster that lost rows keeps at least as many, less one, as any other
            assert min(cut) >= kept.max() - 1

    check()


def test_balance_keeps_the_target_and_the_same_rows_however_the_corpus_is_cut(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    rows = [
        Sample(str(i), "a", picture(0, 16, 16), {"cluster": int(rng.choice(5, p=[0.6, 0.2, 0.1, 0.07, 0.03]))})
        for i in range(80)
    ]
    stage = [{"balance": {"target": 40}}]
    first = run_plan(image_corpus(tmp_path / "a", [rows]), tmp_path / "ao", stage, seed=7)
    second = run_plan(image_corpus(tmp_path / "b", [rows[50:], rows[:50]]), tmp_path / "bo", stage, seed=7)
    other = run_plan(image_corpus(tmp_path / "a", [rows]), tmp_path / "ao", stage, seed=8)
    assert drops(first) == drops(second)
    assert drops(first) != drops(other)
    assert sum(reason is None for reason in drops(first).values()) == 40
    sizes = np.bincount([row.extra["cluster"] for row in rows])
    kept = np.bincount([row["cluster"] for row in first.to_pylist() if row["drop_reason"] is None])
    assert kept.tolist() == quotas(sizes, 40).tolist()


@pytest.mark.parametrize("kept_only", [True, False])
def test_semantic_duplicates_against_a_loop(kept_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic_duplicate, "BLOCK", 16)
    rng = np.random.default_rng(4)
    points = rng.normal(size=(100, 3)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    expected: list[int] = []
    for row in range(len(points)):
        earlier = [i for i in range(row) if points[i] @ points[row] > 0.9 and (not kept_only or expected[i] < 0)]
        expected.append(earlier[0] if earlier else -1)
    assert greedy_duplicates(points, 0.9, kept_only).tolist() == expected


@given(st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), max_size=20))
@settings(deadline=None)
def test_id_words_keep_order_and_come_back(ids: list[str]) -> None:
    words = id_words(ids)
    assert id_text(words) == ids
    assert [id_text(words[i : i + 1])[0] for i in np.lexsort((words[:, 1], words[:, 0]))] == sorted(ids)


def test_keyed_hashes_differ_by_seed_and_purpose() -> None:
    ids = ["0" * 32, "1" * 32]
    seen = {int(keyed_hash(seed, ids, purpose)[0]) for seed in (0, 1, 2) for purpose in ("", "lane", "order")}
    assert len(seen) == 9
    np.testing.assert_array_equal(keyed_hash(1, ids)[::-1], keyed_hash(1, ids[::-1]))


def test_ranged_reads_in_any_order_and_beyond_the_end(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    (tmp_path / "f").write_bytes(data)
    offsets, lengths = [0, 100, 90_000, 90_000, 20, 299_990], [100, 5, 10, 200_000, 3, 11]
    found = list(read_ranges(str(tmp_path / "f"), offsets, lengths))
    assert found == [*(data[o : o + n] for o, n in zip(offsets[:-1], lengths[:-1], strict=True)), None]


@pytest.mark.parametrize("damage", ["truncated", "noise", "text"])
def test_damaged_images_are_refused(damage: str) -> None:
    whole = picture(0, 200, 200)
    data = {"truncated": whole[: len(whole) // 2], "noise": whole[:200] + b"\0" * 500, "text": b"not an image"}[damage]
    with pytest.raises(UndecodableError):
        decode(data)


def test_transparent_pictures_stand_on_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(buffer, "png")
    assert decode(buffer.getvalue()).min() == 255
