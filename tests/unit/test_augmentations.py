"""Augmentations: fixed by their seed, with the values of their papers, and each step what torchvision's is."""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from cl.batches.hashing import mix
from cl.config import parse_config
from cl.encoders.config import ViewConfig
from cl.errors import ConfigError
from cl.views.augmentation import AUGMENTATIONS, Augmentation
from cl.views.image_augmentation import ImageAugmentation
from cl.views.images import Wanted, load_image, load_views
from cl.views.texts import TextAugmentation
from tests.unit.corpora import encoded_image

IMAGES = [entry.name for entry in AUGMENTATIONS.entries() if entry.value.modality == "image"]
TEXTS = [entry.name for entry in AUGMENTATIONS.entries() if entry.value.modality == "text"]


def image(name: str) -> ImageAugmentation:
    found = AUGMENTATIONS[name]
    assert isinstance(found, ImageAugmentation)
    return found


def augment(fields: str | dict[str, Any]) -> Augmentation:
    made = parse_config(ViewConfig, {"tower": "image", "augment": fields}, "test").augment
    assert made is not None
    return made


def picture(seed: int = 0, size: int = 48) -> Image.Image:
    return Image.open(io.BytesIO(encoded_image(seed, size, size, "PNG"))).convert("RGB")


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_fixed_by_the_seed_on_any_thread(name: str) -> None:
    data = encoded_image(4, 120, 90)
    seeds = [int(seed) for seed in mix(0, np.arange(24))]  # 64-bit seeds, as the loader makes them
    alone = [load_image(data, 32, image(name), seed) for seed in seeds]
    torch.manual_seed(1)  # torch's generator has no say
    with ThreadPoolExecutor(4) as pool:
        threads = list(pool.map(lambda seed: load_image(data, 32, image(name), seed), seeds))
    assert all(np.array_equal(a, b) for a, b in zip(alone, threads, strict=True))
    different = len({pixels.tobytes() for pixels in alone})
    assert different == 1 if name == "none" else different > 6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        # Chen et al. 2020, appendix A, with s = 1: 0.8 s, 0.8 s, 0.8 s, 0.2 s; p .8; grey p .2; blur p .5 in [.1, 2].
        ("simclr", [(0.08, 1), 0.5, 0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.5, (0.1, 2.0), 0]),
        # Grill et al. 2020, table 6: flip, jitter, its maxima, grey, blur 1.0 / 0.1, solarisation 0 / 0.2.
        ("byol-1", [(0.08, 1), 0.5, 0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 1.0, (0.1, 2.0), 0]),
        ("byol-2", [(0.08, 1), 0.5, 0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.1, (0.1, 2.0), 0.2]),
        ("dino-local", [(0.05, 0.4), 0.5, 0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.5, (0.1, 2.0), 0]),
        ("swav-global", [(0.14, 1), 0.5, 0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.5, (0.1, 2.0), 0]),
    ],
)
def test_published_values(name: str, said: list[Any]) -> None:
    a = image(name)
    assert [a.scale, a.flip, a.jitter, a.brightness, a.contrast, a.saturation, a.hue, a.grey, a.blur, a.sigma] == said[
        :-1
    ]
    assert a.solarise == said[-1]
    assert a.name == name


@pytest.mark.parametrize(
    ("field", "width", "adjust", "low", "high"),
    [
        ("brightness", 0.4, functional.adjust_brightness, 0.6, 1.4),
        ("contrast", 0.8, functional.adjust_contrast, 0.2, 1.8),
        ("saturation", 1.5, functional.adjust_saturation, 0.0, 2.5),
        ("hue", 0.2, functional.adjust_hue, -0.2, 0.2),
    ],
)
def test_jitter_is_torchvisions_with_a_factor_of_the_range(
    field: str, width: float, adjust: Any, low: float, high: float
) -> None:
    """A grid search over torchvision's factors finds the picture again; all of the range comes."""
    original = picture()
    factors = np.linspace(low, high, 81)
    candidates = [np.asarray(adjust(original, float(factor)), np.int64) for factor in factors]
    found = []
    for seed in range(60):
        made = ImageAugmentation.model_validate({"jitter": 1.0, field: width}).apply(original, seed)
        errors = [np.abs(np.asarray(made, np.int64) - each).mean() for each in candidates]
        assert min(errors) < 1.5
        found.append(factors[int(np.argmin(errors))])
    span = high - low
    assert min(found) < low + 0.15 * span
    assert max(found) > high - 0.15 * span
    assert abs(np.mean(found) - (low + high) / 2) < 0.12 * span


def test_each_step_happens_with_its_probability() -> None:
    original = np.asarray(picture())
    counts = {"grey": 0, "blur": 0, "solarise": 0, "flip": 0}
    for seed in range(1000):
        for name in counts:
            made = np.asarray(ImageAugmentation.model_validate({name: 0.2}).apply(Image.fromarray(original), seed))
            counts[name] += not np.array_equal(made, original)
    assert all(160 <= count <= 240 for count in counts.values()), counts  # 200 with a deviation of 13


def test_grey_solarisation_and_blur_are_what_they_are_called() -> None:
    original = np.asarray(picture(), np.int64)
    grey = np.asarray(ImageAugmentation(grey=1.0).apply(picture(), 0), np.int64)
    luma = original @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    assert np.abs(grey - luma[..., None]).max() <= 1
    solarised = np.asarray(ImageAugmentation(solarise=1.0, threshold=100).apply(picture(), 0))
    assert np.array_equal(solarised, np.where(original >= 100, 255 - original, original))
    rough = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    blurred = np.asarray(ImageAugmentation(blur=1.0, sigma=(1.0, 1.0)).apply(Image.fromarray(rough), 0), np.float64)
    # White noise through a Gaussian of sigma 1: the deviation falls by 2 sqrt(pi) sigma = 3.54.
    assert np.std(rough) / np.std(blurred[4:-4, 4:-4]) == pytest.approx(3.54, rel=0.1)


def test_several_views_are_each_view_alone() -> None:
    views = [Wanted(32, image("simclr"), 7), Wanted(16, image("dino-local"), 8), Wanted(40)]
    data = encoded_image(2, 120, 90, "PNG")
    for made, view in zip(load_views(data, views), views, strict=True):
        assert made.shape == (view.size, view.size, 3)
        assert np.array_equal(made, load_image(data, *view))
    data = encoded_image(2, 1200, 900)  # libjpeg's scale is that of the most demanding view
    for made, view in zip(load_views(data, views), views, strict=True):
        assert np.abs(made.astype(int) - load_image(data, *view).astype(int)).mean() < 2.5


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_fixed_by_the_seed_and_keep_a_word(name: str) -> None:
    chosen = AUGMENTATIONS[name]
    assert isinstance(chosen, TextAugmentation)
    text = "one two  three four five six seven eight nine ten"
    made = [chosen.apply(text, seed) for seed in range(50)]
    assert made == [chosen.apply(text, seed) for seed in range(50)]
    assert len(set(made)) > 10
    words = text.split()
    for each in made:
        places = [words.index(word) for word in each.split()]
        assert places
        assert places == sorted(places)  # words of the text, in its order
    assert chosen.apply("word", 3) == "word"
    assert chosen.apply("", 3) == ""


def test_words_are_deleted_with_the_probability_and_spans_have_the_share() -> None:
    text = " ".join(str(n) for n in range(100))
    left = [len(TextAugmentation(name="x", delete=0.1).apply(text, seed).split()) for seed in range(200)]
    assert np.mean(left) == pytest.approx(90, abs=1)
    assert all(TextAugmentation(name="x", delete=0.999).apply(text, seed) for seed in range(100))
    spans = [[int(w) for w in TextAugmentation(name="x", span=(0.2, 0.5)).apply(text, s).split()] for s in range(300)]
    assert all(span == list(range(span[0], span[0] + len(span))) for span in spans)
    lengths = [len(span) for span in spans]
    assert (min(lengths), max(lengths)) == (20, 50)
    starts = [span[0] for span in spans]
    assert min(starts) < 5
    assert max(span[-1] for span in spans) > 95


def test_an_augmentation_by_name_takes_other_values() -> None:
    made = augment({"name": "simclr", "flip": 0.0})
    assert isinstance(made, ImageAugmentation)
    assert (made.flip, made.hue, made.name) == (0.0, 0.2, "simclr")
    again = parse_config(ViewConfig, json.loads(json.dumps({"tower": "i", "augment": made.model_dump()})), "test")
    assert again.augment == made  # a resolved config says the same


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("simclir", "'augment' has the value 'simclir', but: No augmentation is called 'simclir'"),
        ("simclir", "Did you mean 'simclr'?"),
        ({"scale": [0.1, 1]}, "a name such as simclr, or a mapping with the field name"),
        ({"name": "simclr", "flp": 0}, "Did you mean 'flip'?"),
        ({"name": "simclr", "flip": 2}, "less than or equal to 1"),
        ({"name": "simclr", "scale": [0.5, 0.1]}, "scale must rise within (0, 1], not [0.5, 0.1]"),
        ({"name": "span", "span": [0, 2]}, "span must rise within (0, 1]"),
    ],
)
def test_what_is_no_augmentation_is_refused(fields: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        augment(fields)
    assert words in str(caught.value)
