"""Image views: decoding of every kind of file, crops, and randomness fixed by a seed."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cl.views import images
from cl.views.draws import uniforms
from cl.views.image_augmentation import ImageAugmentation
from cl.views.images import UnreadableImageError, crop_box, load_image
from tests.unit.corpora import encoded_image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats(kind: str) -> None:
    picture = load_image(encoded_image(0, 90, 70, kind), 32)
    assert picture.shape == (32, 32, 3)
    assert picture.dtype == np.uint8
    exact = load_image(encoded_image(0, 90, 70, "PNG"), 32).astype(int)
    assert np.abs(picture.astype(int) - exact).mean() < 6


def test_scaled_jpeg_decoding_is_near_full_decoding() -> None:
    """A 1,600-pixel JPEG is decoded at a fraction of its size; the picture is that of PIL at full size."""
    data = encoded_image(1, 1600, 1200)
    ours = load_image(data, 64).astype(int)
    full = Image.open(io.BytesIO(data)).convert("RGB")
    theirs = np.asarray(full.resize((64, 64), Image.Resampling.BICUBIC, box=(200, 0, 1400, 1200))).astype(int)
    assert np.abs(ours - theirs).mean() < 1.5


def test_transparency_stands_on_white() -> None:
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert (load_image(encoded(clear, "PNG"), 16) == 255).all()
    half = Image.new("RGBA", (40, 40), (255, 0, 0, 128))
    assert np.abs(load_image(encoded(half, "PNG"), 16)[0, 0].astype(int) - [255, 127, 127]).max() <= 1
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert (load_image(encoded(palette, "PNG", transparency=0), 16) == 255).all()


def test_grey_and_deep_images() -> None:
    grey = load_image(encoded(Image.new("L", (20, 20), 77), "JPEG"), 16)
    assert np.abs(grey.astype(int) - 77).max() <= 1
    deep = Image.fromarray(np.full((20, 20), 0x8000, dtype=np.uint16))
    assert (load_image(encoded(deep, "PNG"), 16) == 128).all()
    cmyk = load_image(encoded(Image.new("CMYK", (20, 20), (0, 0, 0, 0)), "JPEG"), 16)
    assert (cmyk > 250).all()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text that is no image",
        encoded_image(0, 90, 70)[:300],
        encoded_image(0, 90, 70, "PNG")[:-40],
        b"\xff\xd8" + b"\0" * 100,
        b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
    ],
    ids=["empty", "text", "jpeg-cut", "png-cut", "jpeg-noise", "png-noise"],
)
def test_broken_images_have_a_reason(data: bytes) -> None:
    with pytest.raises(UnreadableImageError, match=r"\w+"):
        load_image(data, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decompression_bombs_are_refused_by_their_header(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded_image(0, 100, 100, kind)
    monkeypatch.setattr(images, "MAX_PIXELS", 9_999)
    with pytest.raises(UnreadableImageError, match="100 x 100 pixels are more than 9999"):
        load_image(data, 32)


def test_crops_stay_inside_and_have_the_asked_size() -> None:
    augmentation = ImageAugmentation(scale=(0.3, 0.8), ratio=(0.7, 1.4))
    areas = []
    for seed in range(500):
        left, top, right, bottom = crop_box(200, 100, augmentation, seed)
        assert 0 <= left < right <= 200
        assert 0 <= top < bottom <= 100
        areas.append((right - left) * (bottom - top) / 20_000)
    assert 0.28 < min(areas) < 0.35
    assert max(areas) < 0.82
    assert crop_box(200, 100, None, 0) == (50, 0, 150, 100)


def test_augmentation_is_fixed_by_the_seed() -> None:
    data = encoded_image(3, 120, 90)
    augmentation = ImageAugmentation(scale=(0.2, 0.9), flip=0.5)
    first = load_image(data, 32, augmentation, 11)
    assert np.array_equal(first, load_image(data, 32, augmentation, 11))
    assert sum(np.array_equal(first, load_image(data, 32, augmentation, seed)) for seed in range(20)) == 1


def test_flip() -> None:
    data = encoded_image(3, 64, 64, "PNG")
    plain = load_image(data, 64)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    assert np.array_equal(load_image(data, 64, ImageAugmentation(**whole, flip=1.0), 5), plain[:, ::-1])
    assert np.array_equal(load_image(data, 64, ImageAugmentation(**whole, flip=0.0), 5), plain)
    flips = [np.array_equal(load_image(data, 64, ImageAugmentation(**whole, flip=0.5), s), plain) for s in range(200)]
    assert 70 < sum(flips) < 130


def test_uniform_numbers() -> None:
    draws = np.array([uniforms(seed, 5) for seed in range(2000)])
    assert 0 <= draws.min() < draws.max() < 1
    assert np.abs(draws.mean(0) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.1
    assert uniforms(7, 3, skip=2) == uniforms(7, 5)[2:]
    assert uniforms(0, 1) == [0.8833108082136426]  # splitmix64's first output for seed 0
