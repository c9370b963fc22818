"""Readers: one file format each, from a shard's bytes to samples and to what cannot be used.

A reader yields records in the order of the file: an `ImageSample` or a `TextSample`, or a `Rejected` with a reason of
the vocabulary below. Nothing is skipped in silence and nothing in a file makes a reader raise; only what the user can
mend before a run (a missing column) is a `DataError`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

# The whole vocabulary of `reason` in a quarantine written by ingest.
REASONS: Final = {
    "missing_image": "the sample has no image member",
    "missing_caption": "the sample has no caption member or field",
    "empty_caption": "the caption is empty or white space",
    "missing_text": "a text of the pair is null or absent",
    "empty_text": "a text of the pair is empty or white space",
    "wrong_type": "a field has a value of another type than text",
    "invalid_utf8": "text that is not UTF-8",
    "invalid_json": "metadata or a line that is not a JSON object",
    "not_an_image": "an image member whose bytes are no image, whatever its name",
    "unsupported_image": "an image of a kind that Clew does not read",
    "truncated_image": "an image that ends too early",
    "corrupt_image": "an image whose header cannot be read",
    "too_many_pixels": "an image so large that it is taken for a decompression bomb",
    "duplicate_key": "a key that an earlier sample of the same shard has",
    "unsafe_name": "a member whose name leaves the folder of its tar",
    "unsupported_member": "a link, device or sparse file",
    "oversized_member": "a member larger than a sample can be",
    "damaged_shard": "a stretch of the shard that cannot be read",
    "truncated_shard": "the shard ends too early",
    "compressed_shard": "a compressed tar, in which nothing can be addressed by offset",
    "unreadable_shard": "a file that cannot be read at all",
    "removed": "a sample that was taken down (clew remove)",
}


class ImageSample(NamedTuple):
    """An image-text sample; `offset` and `length` in bytes within the shard, sizes in pixels."""

    key: str
    offset: int
    length: int
    format: str
    width: int
    height: int
    text: str
    content: str
    meta: str | None


class TextSample(NamedTuple):
    """A pair of texts, with explicit negatives if the source has them."""

    key: str
    anchor: str
    positive: str
    negatives: list[str] | None
    meta: str | None


class Rejected(NamedTuple):
    """What goes to the quarantine; `key` is None if the shard broke before a key was known."""

    key: str | None
    reason: str
    detail: str | None


Record = ImageSample | TextSample | Rejected
