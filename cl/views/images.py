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
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 100_000_000  # the bound of `clew ingest` too; more is taken for a decompression bomb
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
_MASK = (1 << 64) - 1


class UnreadableImageError(Exception):
    """An image that cannot be used; the message is a short reason for the quarantine table."""


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and mirror (Szegedy et al. 2015, "Going Deeper with Convolutions").

    Attributes:
        scale: share of the picture's area the crop covers, from and to.
        ratio: width / height of the crop, from and to.
        flip: probability of a mirror image; 0 where captions name left and right, or pictures hold letters.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0


def uniforms(seed: int, count: int, skip: int = 0) -> list[float]:
    """`count` numbers in [0, 1) that depend on the seed alone (splitmix64), after the first `skip`."""
    out = []
    for step in range(skip + 1, skip + count + 1):
        z = (seed + step * 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        out.append(((z ^ (z >> 31)) >> 11) * 2.0**-53)
    return out


def crop_box(width: int, height: int, size: int, augmentation: Augmentation | None, seed: int) -> Box:
    """The part of a `width` x `height` picture to resize to the target: (left, top, right, bottom) in pixels.

    With an augmentation: up to ten draws of area and aspect, as torchvision does, else the centre crop.
    """
    if augmentation is not None:
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


def load_image(data: bytes, size: int, augmentation: Augmentation | None = None, seed: int = 0) -> np.ndarray:
    """Decode an image to RGB uint8 [size, size, 3].

    Args:
        data: the encoded image.
        size: side of the result, pixels.
        augmentation: random crop and flip; None resizes the short side and crops the centre.
        seed: fixes the augmentation.

    Raises:
        UnreadableImageError: not an image, truncated, or more than MAX_PIXELS.
    """
    decoded = _decode_jpeg(data, size, augmentation, seed) if data[:2] == b"\xff\xd8" else None
    picture, box = decoded or _decode_any(data, size, augmentation, seed)
    if picture.size != (size, size) or box != (0, 0, size, size):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(picture)
    if augmentation is not None and uniforms(seed ^ 0x5851F42D4C957F2D, 1)[0] < augmentation.flip:
        pixels = pixels[:, ::-1]
    return pixels


def _decode_jpeg(
    data: bytes, size: int, augmentation: Augmentation | None, seed: int
) -> tuple[Image.Image, Box] | None:
    """A JPEG at reduced scale and its crop box there, or None if libjpeg does not like it (PIL then decides)."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > MAX_PIXELS:
            raise UnreadableImageError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
        left, top, right, bottom = crop_box(width, height, size, augmentation, seed)
        pixels = simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_width=min(width, math.ceil(width * size / (right - left))),
            min_height=min(height, math.ceil(height * size / (bottom - top))),
        )
    except ValueError:
        return None
    x, y = pixels.shape[1] / width, pixels.shape[0] / height
    return Image.fromarray(pixels), (
        left * x,
        top * y,
        min(right * x, pixels.shape[1]),
        min(bottom * y, pixels.shape[0]),
    )


def _decode_any(data: bytes, size: int, augmentation: Augmentation | None, seed: int) -> tuple[Image.Image, Box]:
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
    return _rgb(image), crop_box(image.width, image.height, size, augmentation, seed)


def _rgb(image: Image.Image) -> Image.Image:
    """RGB, transparency on white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")
