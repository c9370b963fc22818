"""The heavy plane: encoded images by ranged reads, and their pixels by scaled decoding.

Neighbouring ranges are read together, so that a fragment (whose rows stand in the order of their bytes) is one stream
and a shuffled selection costs few requests.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from cl import storage
from cl.corpus import Corpus
from cl.errors import DataError

GAP = 64 * 1024  # bytes between two ranges that are cheaper to read over than to ask for anew
READ = 16 * 1024 * 1024  # bytes of one read at most, unless a single image is larger
SHORT_SIDE = 128  # pixels: pixel stages get images at the smallest JPEG scale whose short side is at least this
MAX_PIXELS = 100_000_000  # decoded: more is a decompression bomb
MISSING_BYTES = "the shard ends before its bytes"  # what is wrong with an image that is None


class UndecodableError(Exception):
    """An image whose bytes cannot be decoded; the text says why."""


def read_ranges(url: str, offsets: Sequence[int], lengths: Sequence[int]) -> Iterator[bytes | None]:
    """The bytes of each range of a file, in the given order; None where the file ends before the range does.

    Ranges in ascending order that are close together are fetched by one read.

    Raises:
        DataError: there is no such file.
    """
    fs, path = storage.open_fs(url)
    try:
        with fs.open(path, "rb", cache_type="none") as file:
            start = 0
            while start < len(offsets):
                end, stop = start + 1, offsets[start] + lengths[start]
                while (
                    end < len(offsets)
                    and stop <= offsets[end] <= stop + GAP
                    and offsets[end] + lengths[end] - offsets[start] <= READ
                ):
                    stop = offsets[end] + lengths[end]
                    end += 1
                file.seek(offsets[start])
                block = file.read(stop - offsets[start])
                for row in range(start, end):
                    begin = offsets[row] - offsets[start]
                    data = block[begin : begin + lengths[row]]
                    yield data if len(data) == lengths[row] else None
                start = end
    except FileNotFoundError as error:
        raise DataError(f"Shard {url} does not exist, but the corpus points to it.") from error


def read_rows(corpus: Corpus, rows: pa.Table) -> Iterator[bytes | None]:
    """The encoded images of rows (`shard`, `offset`, `length`) in row order."""
    shards = rows["shard"].to_pylist()
    offsets, lengths = rows["offset"].to_pylist(), rows["length"].to_pylist()
    start = 0
    while start < len(shards):
        end = start
        while end < len(shards) and shards[end] == shards[start]:
            end += 1
        yield from read_ranges(corpus.shard_url(shards[start]), offsets[start:end], lengths[start:end])
        start = end


def decode(data: bytes) -> np.ndarray:
    """Pixels of an encoded image, uint8 [H, W, 3], transparent parts on white.

    JPEGs are decoded at the smallest scale whose short side is at least `SHORT_SIDE` pixels.

    Raises:
        UndecodableError: truncated, damaged, or larger than `MAX_PIXELS`.
    """
    if data[:3] == b"\xff\xd8\xff":
        import simplejpeg

        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if height * width > MAX_PIXELS:
                raise UndecodableError(f"{width} x {height} pixels")
            if space in ("RGB", "YCbCr", "Gray"):
                return simplejpeg.decode_jpeg(data, "RGB", False, False, SHORT_SIDE, SHORT_SIDE, 1.0, strict=True)
        except ValueError as error:
            raise UndecodableError(" ".join(str(error).split())) from error
    return decode_whole(data)


def decode_whole(data: bytes) -> np.ndarray:
    """Pixels of an encoded image in its own size, uint8 [H, W, 3], transparent parts on white.

    Raises:
        UndecodableError: truncated, damaged, or larger than `MAX_PIXELS`.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP", "GIF"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UndecodableError(f"{image.width} x {image.height} pixels")
            if image.has_transparency_data:
                whole = image.convert("RGBA")
                flat = Image.new("RGBA", whole.size, "white")
                flat.alpha_composite(whole)
                return np.asarray(flat.convert("RGB"))
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UndecodableError(" ".join(str(error).split()) or type(error).__name__) from error
