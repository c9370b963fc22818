"""webdataset tars: members that share a key are one image-text sample.

Members may stand in any order. A member that comes twice under one key begins a second sample of that key, which is
rejected as `duplicate_key`, so the first stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from cl.corpus import content_hash
from pipelines.images import ImageInfo, Unusable, probe
from pipelines.readers import ImageSample, Record, Rejected
from pipelines.tar import Damage, Member, Reader, scan, split_name

MAX_IMAGE_BYTES: Final = 256 << 20
MAX_TEXT_BYTES: Final = 16 << 20
# Which members of a sample mean what, in order of preference.
COLUMNS: Final = {"image": "jpg;jpeg;png;webp;gif", "text": "txt;text;caption", "meta": "json"}


@dataclass
class _Group:
    """The members of one sample, as far as they have been seen."""

    key: str
    first: int  # offset of its first member, bytes
    repeated: bool = False
    suffixes: set[str] = field(default_factory=set)
    images: dict[str, tuple[Member, str, ImageInfo | Unusable]] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    problem: Rejected | None = None


class TarReader:
    """Reads tars with a given meaning of their members.

    Args:
        columns: `image`, `text` and `meta` -> suffixes in order of preference, joined by semicolons; the text may
            also be `json.FIELD`, a field of the metadata.
        max_pixels: a larger image is rejected.
    """

    def __init__(self, columns: dict[str, str], max_pixels: int) -> None:
        wanted = {name: (columns.get(name) or default).split(";") for name, default in COLUMNS.items()}
        self.image, self.text, self.meta = wanted["image"], wanted["text"], wanted["meta"][0]
        self._images = frozenset(self.image)
        self._texts = frozenset([name for name in self.text if not name.startswith("json.")] + [self.meta])
        self.max_pixels = max_pixels

    def read(self, reader: Reader) -> Iterator[Record]:
        """Every sample of a tar in the order of its bytes."""
        groups: list[_Group] = []
        latest: dict[str, _Group] = {}
        loose: list[Rejected] = []
        for found in scan(reader):
            key, suffix = split_name(found.name) if found.name else ("", "")
            if isinstance(found, Damage) and not key.rpartition("/")[2]:
                loose.append(Rejected(None, found.reason, found.detail))
                continue
            if not key.rpartition("/")[2]:
                continue  # hidden files, such as those that archivers of some systems add
            group = latest.get(key)
            if group is None or suffix in group.suffixes:
                group = latest[key] = _Group(key, found.offset, repeated=group is not None)
                groups.append(group)
            group.suffixes.add(suffix)
            if isinstance(found, Damage):
                group.problem = group.problem or Rejected(key, found.reason, found.detail)
            else:
                self._take(group, suffix, found, reader)
        records = [(self._finish(group), group) for group in groups]
        # Rows stand in the order of their images' bytes, wherever their captions are.
        records.sort(key=lambda item: item[0].offset if isinstance(item[0], ImageSample) else item[1].first)
        yield from (record for record, _ in records)
        yield from loose

    def _take(self, group: _Group, suffix: str, member: Member, reader: Reader) -> None:
        is_image = suffix in self._images
        if not is_image and suffix not in self._texts:
            return
        if member.size > (MAX_IMAGE_BYTES if is_image else MAX_TEXT_BYTES):
            detail = f"{member.name} has {member.size} bytes"
            group.problem = group.problem or Rejected(group.key, "oversized_member", detail)
            return
        data = reader.read_at(member.offset, member.size)
        if is_image:
            group.images[suffix] = (member, content_hash(data), probe(data, self.max_pixels))
        else:
            group.texts[suffix] = data

    def _finish(self, group: _Group) -> ImageSample | Rejected:
        key = group.key
        if group.problem is not None:
            return group.problem
        if group.repeated:
            return Rejected(key, "duplicate_key", f"an earlier sample has this key; this one is at byte {group.first}")
        image = next((group.images[name] for name in self.image if name in group.images), None)
        if image is None:
            return Rejected(key, "missing_image", f"has only {', '.join(sorted(group.suffixes))}")
        member, content, info = image
        if isinstance(info, Unusable):
            return Rejected(key, info.reason, f"{member.name}: {info.detail}")
        try:
            meta = parse_object(group.texts[self.meta]) if self.meta in group.texts else None
        except ValueError as error:
            return Rejected(key, "invalid_json", f"{key}.{self.meta}: {error}")
        text = self._caption(group, meta)
        if isinstance(text, Rejected):
            return text
        size = (member.offset, member.size, info.format, info.width, info.height)
        return ImageSample(key, *size, text, content, None if meta is None else orjson.dumps(meta).decode())

    def _caption(self, group: _Group, meta: dict[str, Any] | None) -> str | Rejected:
        for name in self.text:
            if name.startswith("json."):
                value = (meta or {}).get(name[5:])
                if value is None:
                    continue
                if not isinstance(value, str):
                    return Rejected(group.key, "wrong_type", f"{name} is a {type(value).__name__}, not text")
            elif name in group.texts:
                try:
                    value = group.texts[name].decode("utf-8")
                except UnicodeDecodeError as error:
                    return Rejected(group.key, "invalid_utf8", f"{group.key}.{name}: {error}")
            else:
                continue
            text = value.strip().strip("\ufeff\0")
            return text if text else Rejected(group.key, "empty_caption", f"{name} has no text")
        return Rejected(group.key, "missing_caption", f"has only {', '.join(sorted(group.suffixes))}")


def parse_object(data: bytes | str) -> dict[str, Any]:
    """A JSON object; NaN and infinities, which many writers emit, become null.

    Raises:
        ValueError: not JSON, or not an object.
    """
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        try:
            value = json.loads(data, parse_constant=lambda _: None)
            orjson.dumps(value)  # lone surrogates are no text that a table could hold
        except (ValueError, TypeError, RecursionError):
            raise ValueError(str(error)) from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value
