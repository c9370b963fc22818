"""Images: from encoded bytes to a square uint8 picture, augmented by a seed or cropped at the centre.

JPEGs are decoded at the smallest of libjpeg's scales that still covers the target (simplejpeg, about three times
PIL's speed at 224 pixels); everything else goes through PIL. Transparent pictures stand on white, for their black
"background" is an accident of the file format.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from cl.views.draws import uniforms
from cl.views.image_augmentation import ImageAugmentation

MAX_PIXELS = 100_000_000  # the bound of `clew ingest` too; more is taken for a decompression bomb
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


class UnreadableImageError(Exception):
    """An image that cannot be used; the message is a short reason for the quarantine table."""


class Wanted(NamedTuple):
    """A view of a picture: the side of the square in pixels, how it is augmented (None: the centre), and its seed."""

    size: int
    augmentation: ImageAugmentation | None = None
    seed: int = 0


def crop_box(width: int, height: int, augmentation: ImageAugmentation | None, seed: int) -> Box:
    """The part of a `width` x `height` picture to resize to the target: (left, top, right, bottom) in pixels.

    Random resized crop (Szegedy et al. 2015, "Going Deeper with Convolutions"): up to ten draws of area and aspect, as
    torchvision does, else the centre crop.
    """
    if augmentation is not None and augmentation.scale is not None:
        low, high = augmentation.scale
        ratios = [math.log(r) for r in augmentation.ratio]
        for attempt in range(10):
            u_area, u_ratio, u_x, u_y = uniforms(seed, 4, skip=4 * attempt)
            area = width * height * (low + u_area * (high - low))
            ratio = math.exp(ratios[0] + u_ratio * (ratios[1] - ratios[0]))
            crop_w, crop_h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_w <= width and 0 < crop_h <= height:
                left = int(u_x * (width - crop_w + 1))
                top = int(u_y * (height - crop_h + 1))
                return left, top, left + crop_w, top + crop_h
    side = min(width, height)
    x, y = (width - side) / 2, (height - side) / 2
    return x, y, x + side, y + side


def load_views(data: bytes, views: Sequence[Wanted]) -> list[np.ndarray]:
    """Several views of one encoded image, decoded once: RGB uint8 [size, size, 3] each.

    Raises:
        UnreadableImageError: not an image, truncated, or more than MAX_PIXELS.
    """
    decoded = _decode_jpeg(data, views) if data[:2] == b"\xff\xd8" else None
    picture, boxes = decoded or _decode_any(data, views)
    made = []
    for (size, augmentation, seed), box in zip(views, boxes, strict=True):
        view = picture
        if view.size != (size, size) or box != (0, 0, size, size):
            view = view.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if augmentation is not None:
            view = augmentation.apply(view, seed)
        made.append(np.asarray(view))
    return made


def load_image(data: bytes, size: int, augmentation: ImageAugmentation | None = None, seed: int = 0) -> np.ndarray:
    """Decode an image to RGB uint8 [size, size, 3].

    Args:
        data: the encoded image.
        size: side of the result, pixels.
        augmentation: None resizes the short side and crops the centre.
        seed: fixes the augmentation.

    Raises:
        UnreadableImageError: not an image, truncated, or more than MAX_PIXELS.
    """
    return load_views(data, [Wanted(size, augmentation, seed)])[0]


def _boxes(width: int, height: int, views: Sequence[Wanted]) -> list[Box]:
    return [crop_box(width, height, view.augmentation, view.seed) for view in views]


def _decode_jpeg(data: bytes, views: Sequence[Wanted]) -> tuple[Image.Image, list[Box]] | None:
    """A JPEG at the smallest scale that is enough for all views, and the views' crops there.

    None if libjpeg does not like it; PIL then decides.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            raise UnreadableImageError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
        boxes = _boxes(width, height, views)
        crops = [(view.size, box[2] - box[0], box[3] - box[1]) for view, box in zip(views, boxes, strict=True)]
        pixels = simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_width=min(width, max(math.ceil(width * size / crop_width) for size, crop_width, _ in crops)),
            min_height=min(height, max(math.ceil(height * size / crop_height) for size, _, crop_height in crops)),
        )
    except ValueError:
        return None
    picture = Image.fromarray(pixels)
    x, y = picture.width / width, picture.height / height
    scaled = [(a * x, b * y, min(c * x, picture.width), min(d * y, picture.height)) for a, b, c, d in boxes]
    return picture, scaled


def _decode_any(data: bytes, views: Sequence[Wanted]) -> tuple[Image.Image, list[Box]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of bombs and odd metadata; the bound below decides
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            image.load()
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"more than {MAX_PIXELS} pixels") from error
    except (OSError, ValueError, SyntaxError, IndexError, TypeError, EOFError, struct.error) as error:
        reason = " ".join(str(error).split())
        reason = "not an image in a known format" if "cannot identify" in reason else reason
        raise UnreadableImageError(reason or type(error).__name__) from error
    return _rgb(image), _boxes(image.width, image.height, views)


def _rgb(image: Image.Image) -> Image.Image:
    """RGB, transparency on white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")
