"""What an encoded image is, from its first and last bytes, without decoding it.

    info = probe(data)                    # ImageInfo, or Unusable with the reason

The kind comes from the bytes, never from a file name. Truncation is seen from structure alone (the end marker of JPEG,
PNG and GIF, the length in WebP), which costs microseconds; damage inside the pixels shows only when a stage or a
training worker decodes the image, and is quarantined there.
"""

from __future__ import annotations

import io
import zlib
from typing import Final, NamedTuple

MAX_PIXELS: Final = 100_000_000  # a larger image is taken for a decompression bomb


class ImageInfo(NamedTuple):
    """Kind (jpeg, png, webp, gif) and size in pixels."""

    format: str
    width: int
    height: int


class Unusable(NamedTuple):
    """Why an image cannot be used: a reason of the quarantine's vocabulary and what was seen."""

    reason: str  # not_an_image, unsupported_image, truncated_image, corrupt_image, too_many_pixels
    detail: str


# Kinds that are images but that no part of Clew decodes.
_OTHER_KINDS: Final = {
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "PSD",
    b"\0\0\1\0": "ICO",
    b"<svg": "SVG",
}


def probe(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageInfo | Unusable:
    """Kind and size of an encoded image, if it seems whole.

    Args:
        data: the encoded image.
        max_pixels: width times height above which it is refused.
    """
    if data.startswith(b"\xff\xd8\xff"):
        found = _jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        found = _png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = _webp(data)
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        found = _gif(data)
    else:
        return _unknown(data)
    if isinstance(found, ImageInfo):
        if found.width < 1 or found.height < 1:
            return Unusable("corrupt_image", f"a {found.format} of {found.width} x {found.height} pixels")
        if found.width * found.height > max_pixels:
            return Unusable("too_many_pixels", f"{found.width} x {found.height} pixels, more than {max_pixels}")
    return found


def _unknown(data: bytes) -> Unusable:
    for magic, name in _OTHER_KINDS.items():
        if data.startswith(magic):
            return Unusable("unsupported_image", f"{name} is not read; convert it to JPEG, PNG, WebP or GIF")
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
        return Unusable("unsupported_image", "AVIF or HEIF is not read; convert it to JPEG, PNG, WebP or GIF")
    return Unusable("not_an_image", f"{len(data)} bytes that start with {data[:12]!r}" if data else "0 bytes")


def _jpeg(data: bytes) -> ImageInfo | Unusable:
    import simplejpeg

    if not data.endswith(b"\xff\xd9"):
        start = _scan_start(data)
        # An end marker before the scan belongs to a thumbnail; within the scan, ff d9 is nothing but the end marker.
        if start is None or data.find(b"\xff\xd9", start) < 0:
            return Unusable("truncated_image", f"a JPEG of {len(data)} bytes without its end marker")
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        return Unusable("corrupt_image", f"JPEG header: {error}")
    return ImageInfo("jpeg", width, height)


def _scan_start(data: bytes) -> int | None:
    """Offset behind the first start-of-scan header, or None if the segments end before it."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:
            return position
    return None


def _png(data: bytes) -> ImageInfo | Unusable:
    if len(data) < 33:
        return Unusable("truncated_image", f"a PNG of {len(data)} bytes")
    if data[12:16] != b"IHDR" or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        return Unusable("corrupt_image", "PNG header with a wrong checksum")
    position, pixels = 33, False
    while position + 12 <= len(data):
        kind = data[position + 4 : position + 8]
        if kind == b"IEND":
            if not pixels:
                return Unusable("corrupt_image", "a PNG without pixels")
            return ImageInfo("png", int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
        pixels |= kind == b"IDAT"
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return Unusable("truncated_image", f"a PNG of {len(data)} bytes without its end chunk")


def _gif(data: bytes) -> ImageInfo | Unusable:
    if len(data) < 14 or not data.rstrip(b"\0").endswith(b";"):
        return Unusable("truncated_image", f"a GIF of {len(data)} bytes without its trailer")
    return ImageInfo("gif", int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little"))


def _webp(data: bytes) -> ImageInfo | Unusable:
    stated = int.from_bytes(data[4:8], "little") + 8
    if len(data) < stated:
        return Unusable("truncated_image", f"a WebP with {len(data)} of {stated} bytes")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as image:  # reads the header only
            return ImageInfo("webp", image.width, image.height)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Unusable("corrupt_image", f"WebP header: {error}")
