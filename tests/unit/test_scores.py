"""Stages that score: texts masked in pictures, and the probability that a sample is clean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from sklearn.mixture import GaussianMixture

from cl.errors import ConfigError, DataError
from pipelines.detectors.registry import TEXT_DETECTORS
from pipelines.heavy import decode_whole
from pipelines.plan import build_plan, parse_stages
from pipelines.stages.masked_embedding import without_text
from tests.curation_corpora import Sample, column_of, image_corpus, picture, run_plan
from tests.unit.test_curation_plan import checkpoint
from tests.vector_corpora import vector_corpus


class MagentaText:
    """Takes everything of one colour for text."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        rows, columns = np.nonzero((pixels == (255, 0, 255)).all(2))
        if not len(rows):
            return np.zeros((0, 4), np.int64)
        return np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])


@pytest.fixture
def magenta() -> Iterator[None]:
    len(TEXT_DETECTORS.entries())  # loads Clew's own
    TEXT_DETECTORS.register("magenta", "one colour")(MagentaText)
    yield
    del TEXT_DETECTORS._entries["magenta"]


def png(pixels: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def test_a_text_takes_the_colour_around_it() -> None:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30], pixels[:, 30:] = (200, 10, 20), (0, 100, 50)
    noisy = pixels.copy()
    noisy[10:20, 5:15] = 255
    noisy[10:20, 40:55] = 7
    boxes = np.array([[5, 10, 15, 20], [40, 10, 55, 20]])
    np.testing.assert_array_equal(without_text(noisy, boxes), pixels)
    ring = np.zeros((20, 20, 3), np.uint8)
    ring[2:18, 2:18], ring[6:14, 6:14] = 90, 255
    assert set(without_text(ring, np.array([[6, 6, 14, 14]]))[6:14, 6:14].ravel()) == {90}, "four pixels around it"
    assert (without_text(noisy, np.array([[-3, -3, 70, 50]])) == np.rint(noisy.reshape(-1, 3).mean(0))).all()


@pytest.mark.usefixtures("magenta")
def test_pictures_are_scored_again_without_their_text(tmp_path: Path) -> None:
    import torch

    from cl.encoders import load_checkpoint_model

    plain = [decode_whole(picture(seed, form="png")) // 2 for seed in range(6)]  # nowhere magenta
    written = [pixels.copy() for pixels in plain]
    for pixels in written[:3]:
        pixels[20:30, 8:50] = (255, 0, 255)
    samples = [Sample(f"k{i}", f"thing number {i}", png(pixels)) for i, pixels in enumerate(written)]
    samples.append(Sample("broken", "thing", png(written[0])[:200], size=(64, 64)))
    corpus = image_corpus(tmp_path / "c", [samples[:2], samples[2:]])
    folder = checkpoint(tmp_path / "m")
    score = {"columns": ["masked_image_embedding", "text_embedding"], "top_fraction": 0.5}
    stages = ["embedding", {"masked_embedding": {"detector": "magenta", "batch_size": 2}}, {"image_text_score": score}]
    table = run_plan(corpus, tmp_path / "o", stages, model=str(folder))
    plan = build_plan(corpus, parse_stages(stages), str(tmp_path / "o"), 0, str(folder))
    model, inputs, _ = load_checkpoint_model(folder)
    masked = []
    for before, pixels in zip(plain, written, strict=True):
        text = (pixels == (255, 0, 255)).all(2)
        filled = pixels.astype(np.float64)
        if text.any():
            around = np.zeros_like(text)
            around[16:34, 4:54] = True
            filled[text] = np.rint(before[around & ~text].astype(np.float64).mean(0))
        masked.append(png(filled.astype(np.uint8)))
    with torch.inference_mode():
        expected = model.encode("image", inputs.images("image", masked)).numpy()
        texts = model.encode("text", inputs.texts("text", [sample.text for sample in samples[:6]])).numpy()
    found = np.array(column_of(plan, "masked_embedding", "masked_image_embedding"), np.float32)[:6]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    own = np.array(column_of(plan, "embedding", "image_embedding"), np.float32)
    assert np.abs(found[:3] - own[:3]).max() > 1e-2, "the mask matters"
    np.testing.assert_allclose(table["text_area"].to_pylist()[:6], [420 / 4096] * 3 + [0] * 3, atol=1e-6)
    scores = np.array(table["image_text_score"].to_pylist()[:6])
    np.testing.assert_allclose(scores, (expected * texts).sum(1), atol=2e-3)
    best = set(np.argsort(-scores)[:3].tolist())
    assert {i for i in range(6) if table["drop_reason"][i].as_py() is None} == best
    assert table["drop_reason"].to_pylist()[6] == "undecodable_image"


def test_detectors_that_are_not_there_are_refused(tmp_path: Path) -> None:
    corpus = image_corpus(tmp_path / "c", [[Sample("a", "b", picture(0))]])
    stages = parse_stages(["embedding", {"masked_embedding": {"detector": "rapidcor"}}])
    with pytest.raises(ConfigError, match=r"No text detector is called 'rapidcor'.*Did you mean 'rapidocr'"):
        build_plan(corpus, stages, str(tmp_path / "o"), 0, str(checkpoint(tmp_path / "m")))


def test_rapidocr_finds_a_line_of_text() -> None:
    pytest.importorskip("rapidocr_onnxruntime", reason="an optional model: pip install clew[ocr]")
    image = Image.new("RGB", (320, 240), (200, 220, 240))
    ImageDraw.Draw(image).text((40, 100), "GRAND SALE 50%", fill="black", font=ImageFont.load_default(28))
    detect = TEXT_DETECTORS["rapidocr"]()
    boxes = detect(np.asarray(image))
    assert len(boxes) >= 1
    assert np.abs(without_text(np.asarray(image), boxes).astype(int) - (200, 220, 240)).max() < 60, "no stroke is left"
    assert detect(np.full((240, 320, 3), 200, np.uint8)).shape == (0, 4)


@pytest.mark.parametrize(("partitions", "cuts"), [(1, []), (4, [100, 700])])
def test_noise_posterior_is_that_of_a_mixture_on_all_values(tmp_path: Path, partitions: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(0)
    losses = np.where(rng.random(1500) < 0.7, rng.normal(0.4, 0.12, 1500), rng.normal(1.6, 0.4, 1500))
    values = losses.tolist()
    values[17] = None
    corpus = vector_corpus(tmp_path / "c", {}, cuts, loss=values)
    stage = {"noise_posterior": {"column": "loss", "min_probability": 0.5}}
    table = run_plan(corpus, tmp_path / "o", [stage], partitions=partitions)
    known = np.delete(losses, 17)[:, None]
    mixture = GaussianMixture(2, tol=1e-7, max_iter=1000, random_state=0).fit(known)
    clean = int(mixture.means_.ravel().argmin())
    expected = mixture.predict_proba(known)[:, clean]
    found = table["clean_probability"].to_pylist()
    assert found.pop(17) is None
    np.testing.assert_allclose(found, expected, atol=5e-3)
    reasons = table["drop_reason"].to_pylist()
    assert reasons.pop(17) == "noisy"
    assert [reason is None for reason in reasons] == [value >= np.float32(0.5) for value in found]
    high = run_plan(corpus, tmp_path / "o", [{"noise_posterior": {"column": "loss", "clean": "high"}}])
    other = high["clean_probability"].to_pylist()
    del other[17]
    np.testing.assert_allclose(np.add(other, found), 1, atol=1e-5)


def test_a_mixture_of_nothing_is_one_sentence_and_of_one_value_is_no_error(tmp_path: Path) -> None:
    stage = [{"noise_posterior": {"column": "loss"}}]
    corpus = vector_corpus(tmp_path / "c", {}, loss=[float("nan")] * 3)
    with pytest.raises(DataError, match="no row has a value in column 'loss'"):
        run_plan(corpus, tmp_path / "o", stage)
    corpus = vector_corpus(tmp_path / "d", {}, loss=[0.25] * 5)
    assert np.isfinite(run_plan(corpus, tmp_path / "p", stage)["clean_probability"].to_numpy()).all()
