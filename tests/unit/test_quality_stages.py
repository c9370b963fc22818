"""Pictures that show nothing, and texts with words of a list, against plain Python."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy import ndimage, stats

from cl.errors import ConfigError
from pipelines.stages.image_quality import image_quality
from tests.curation_corpora import Sample, image_corpus, picture, run_plan, text_corpus


@given(seed=st.integers(0, 10_000), height=st.integers(1, 100), width=st.integers(1, 100))
@settings(max_examples=40, deadline=None)
def test_measures_of_a_small_picture(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.choice(rng.integers(0, 256, (6, 3), dtype=np.uint8), (height, width))
    sharpness, entropy, flat = image_quality(pixels)
    grey = pixels.astype(np.float64) @ [0.299, 0.587, 0.114]
    inner = ndimage.laplace(grey)[1:-1, 1:-1]
    assert sharpness == pytest.approx(inner.var() if inner.size else 0, rel=1e-3, abs=1e-3)
    levels = list(Counter(np.rint(grey.astype(np.float32)).ravel().tolist()).values())
    assert entropy == pytest.approx(stats.entropy(levels, base=2), abs=1e-2)
    colours = Counter(tuple((pixel // 8).tolist()) for pixel in pixels.reshape(-1, 3))
    assert flat == pytest.approx(max(colours.values()) / (height * width))


def test_size_hardly_matters() -> None:
    """The same scene, smooth and rough parts of it, at two sizes."""
    rng = np.random.default_rng(3)
    coarse = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    small, large = (np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) for side in (256, 768))
    assert image_quality(large) == pytest.approx(image_quality(small), rel=0.1, abs=1e-3)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def test_what_shows_nothing_goes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sharp = Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8))
    dotted = np.full((200, 200, 3), 200, np.uint8)
    dotted[:8, :8] = rng.integers(0, 256, (8, 8, 3))
    halves = np.zeros((80, 80, 3), np.uint8)
    halves[:, 7:] = 255
    pictures = {
        "blank": encoded(Image.new("RGB", (64, 64), (250, 250, 250))),
        "nearly blank": encoded(Image.fromarray(dotted)),
        "two colours": encoded(Image.fromarray(halves)),
        "sharp": encoded(sharp),
        "blurred": encoded(sharp.filter(ImageFilter.GaussianBlur(6))),
        "broken": encoded(sharp)[:200],
    }
    corpus = image_corpus(tmp_path / "c", [[Sample(key, key, data) for key, data in pictures.items()]])
    limits = {"min_sharpness": 100, "min_entropy": 0.5, "max_flat": 0.98}
    table = run_plan(corpus, tmp_path / "o", [{"image_quality": limits}])
    found = dict(zip(table["key"].to_pylist(), table["drop_reason"].to_pylist(), strict=True))
    assert found == {
        "blank": "flat",
        "nearly blank": "flat",
        "two colours": "low_entropy",
        "sharp": None,
        "blurred": "blurred",
        "broken": "undecodable_image",
    }
    sharpness = dict(zip(table["key"].to_pylist(), table["image_sharpness"].to_pylist(), strict=True))
    assert sharpness["blurred"] < 100 < sharpness["sharp"]
    default = run_plan(corpus, tmp_path / "d", [{"image_quality": {}}])
    reasons = zip(default["key"].to_pylist(), default["drop_reason"].to_pylist(), strict=True)
    assert [key for key, why in reasons if why is None] == ["two colours", "sharp", "blurred"]


WORDS = ["darn", "Holy Cow", "xxx", "脏话"]
TEXTS = {
    "a darned sock": 0,
    "darn! a sock": 1,
    "DARN, holy  cow": 2,
    "holy, cow": 0,
    "(xxx)": 1,
    "xxxl shirt": 0,
    "这是脏话吗": 1,
    "darn darn darn": 1,
    "": 0,
}


def test_texts_with_words_of_a_list_go(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\n".join([*WORDS, "", "darn"]) + "\n")
    corpus = image_corpus(tmp_path / "c", [[Sample(str(n), text, picture(0, 8, 8)) for n, text in enumerate(TEXTS)]])
    stage = {"path": str(tmp_path / "words.txt")}
    table = run_plan(corpus, tmp_path / "o", [{"blocked_words": stage}])
    assert table["text_blocked"].to_pylist() == list(TEXTS.values())
    assert table["drop_reason"].to_pylist() == ["blocked_word" if count else None for count in TEXTS.values()]
    few = run_plan(corpus, tmp_path / "few", [{"blocked_words": stage | {"most": 1}}])
    assert few["drop_reason"].to_pylist() == ["blocked_word" if count > 1 else None for count in TEXTS.values()]
    exact = run_plan(corpus, tmp_path / "exact", [{"blocked_words": stage | {"case": True}}])
    assert exact["text_blocked"].to_pylist() == [0, 1, 0, 0, 1, 0, 1, 1, 0]


def test_both_texts_of_a_pair_are_judged(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("darn\n")
    corpus = text_corpus(tmp_path / "c", [[("fine", "darn"), ("darn it", "fine"), ("fine", "fine")]])
    table = run_plan(corpus, tmp_path / "o", [{"blocked_words": {"path": str(tmp_path / "words.txt")}}])
    assert table["drop_reason"].to_pylist() == ["blocked_word", "blocked_word", None]


def test_a_list_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path / "c", [[("a", "b")]])
    missing = re.escape(f"Stage 'blocked_words': the list of entries {tmp_path / 'no.txt'} does not exist.")
    with pytest.raises(ConfigError, match=missing):
        run_plan(corpus, tmp_path / "o", [{"blocked_words": {"path": str(tmp_path / "no.txt")}}])
