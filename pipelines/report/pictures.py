"""Thumbnails as data URIs, within a budget of bytes for the whole page."""

from __future__ import annotations

import base64
import io
import warnings
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, UnidentifiedImageError

from cl import storage
from cl.errors import DataError

SIDE = 112  # pixels of a thumbnail's longer side; shown at 96, so that it stays sharp on most screens
QUALITY = 72
MAX_PIXELS = 40_000_000  # larger pictures (decompression bombs among them) are not opened for a thumbnail
MAX_SOURCE_BYTES = 32 << 20


@dataclass(frozen=True)
class Picture:
    """One example: a thumbnail, or the reason why there is none, and what is written below it."""

    uri: str  # data URI, '' where there is no picture
    alt: str
    width: int = 0
    height: int = 0
    missing: str = ""  # why there is no picture
    caption: str = ""
    key: str = ""
    values: tuple[tuple[str, str], ...] = ()  # name and value of what decided about it
    mark: str = ""  # "right" for the right answer among retrieved pictures


@dataclass
class Thumbnails:
    """Makes thumbnails until `budget` bytes of data URIs are spent, then answers with a placeholder."""

    budget: int
    spent: int = 0
    made: int = 0
    refused: int = 0  # for lack of budget
    _cache: dict[tuple[str, int], tuple[str, int, int, str]] = field(default_factory=dict)

    def of_sample(self, roots: list[str], row: dict[str, Any], **words: Any) -> Picture:
        """The thumbnail of a sample by its `shard`, `offset` and `length`.

        Args:
            roots: corpora within which a relative shard path may lie, the most likely first.
            row: a row of the light plane.
            words: `alt`, `caption`, `key`, `values`, `mark` of the `Picture`.
        """
        place = (str(row.get("shard")), int(row.get("offset") or 0))
        if place not in self._cache:
            self._cache[place] = self._make(roots, row)
        uri, width, height, missing = self._cache[place]
        if uri:
            if self.spent + len(uri) > self.budget:
                self.refused += 1
                return Picture("", missing="left out to keep this page small", **words)
            self.spent += len(uri)
            self.made += 1
        return Picture(uri, width=width, height=height, missing=missing, **words)

    def _make(self, roots: list[str], row: dict[str, Any]) -> tuple[str, int, int, str]:
        try:
            data = read_range(roots, str(row["shard"]), int(row["offset"]), int(row["length"]))
            return *thumbnail(data), ""
        except (DataError, KeyError, TypeError, ValueError) as error:
            return "", 0, 0, str(error) if isinstance(error, DataError) else "the picture's place is not known"


def read_range(roots: list[str], shard: str, offset: int, length: int) -> bytes:
    """`length` bytes of a shard from `offset` on.

    Raises:
        DataError: the shard is gone, or the bytes are not in it.
    """
    if length <= 0 or offset < 0 or length > MAX_SOURCE_BYTES:
        raise DataError("the picture is empty or too large")
    for root in roots:
        fs, path = storage.open_fs(storage.join(root, shard))
        try:
            data = fs.cat_file(path, start=offset, end=offset + length)
        except OSError:
            continue
        if len(data) == length:
            return bytes(data)
    raise DataError("its shard is no longer there")


def thumbnail(data: bytes) -> tuple[str, int, int]:
    """A small WebP of an encoded image as (data URI, width, height); transparency is laid on white.

    Raises:
        DataError: it is not an image, is damaged, or is too large to open.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes are checked here; Pillow only warns
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError("the picture has too many pixels")
                image.draft("RGB", (SIDE * 2, SIDE * 2))
                small = _on_white(image)
                small.thumbnail((SIDE, SIDE))
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError("the picture cannot be decoded") from error
    out = io.BytesIO()
    small.save(out, "WEBP", quality=QUALITY, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
    return uri, small.width, small.height


def _on_white(image: Image.Image) -> Image.Image:
    """Any kind of image as RGB."""
    if image.mode.startswith("I"):  # 16 or 32 bits of grey, of which 8 are shown
        return image.point(lambda level: level / 256).convert("RGB")
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    clear = image.convert("RGBA")
    white = Image.new("RGB", clear.size, "white")
    white.paste(clear, mask=clear.getchannel("A"))
    return white
