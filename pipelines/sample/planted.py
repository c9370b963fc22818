"""What is broken in the sample on purpose, so that ingest and curation have something to show and tests to find.

Every planted sample is named after its defect (`planted-truncated-jpeg-1`) and listed in `planted.json` with what
should become of it: `quarantine:REASON` (by ingest), `drop` (a curation stage should drop it) or `keep`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance

FIRST, SECOND, EMOJI = "clipart-00000.tar", "clipart-00001.tar", "emoji-google-00000.tar"
CUT = "planted-truncated-00000.tar"


@dataclass(frozen=True)
class Planted:
    """A sample with a defect: its key, shard, what is wrong, what should happen, and its files."""

    key: str
    shard: str
    defect: str
    expected: str
    members: list[tuple[str, bytes]]
    of: str | None = None  # key of the sample it duplicates

    def row(self) -> dict[str, str | None]:
        """Its line in `planted.json`."""
        return {name: getattr(self, name) for name in ("key", "shard", "defect", "expected", "of")}


def encode(picture: Image.Image, kind: str = "JPEG", quality: int = 75) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **({"quality": quality} if kind == "JPEG" else {"optimize": True}))
    return out.getvalue()


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def files(key: str, sample: Any, **change: bytes | None) -> list[tuple[str, bytes]]:
    """The three files of a sample under another key; `jpg`, `txt` or `json` replaced, or left out by None."""
    meta = json.dumps(sample.meta, ensure_ascii=False, sort_keys=True).encode()
    parts: dict[str, bytes | None] = {"jpg": sample.image, "txt": sample.text.encode(), "json": meta} | change
    return [(f"{key}.{suffix}", data) for suffix, data in parts.items() if data is not None]


def plant_images(train: list[Any], spare: list[Any], translated: list[Any]) -> list[Planted]:
    """All planted image samples but those of the truncated tar.

    Args:
        train: the clip-art samples of both train shards, for duplicates.
        spare: drawings that are nowhere else, for the other defects.
        translated: emoji whose text is not English and whose key is the language.
    """
    planted: list[Planted] = []
    left = iter(spare)

    def add(name: str, number: int, shard: str, defect: str, expected: str, sample: Any, **change: Any) -> None:
        key, of = f"planted-{name}-{number}", change.pop("of", None)
        planted.append(Planted(key, shard, defect, expected, files(key, sample, **change), of))

    for i in (1, 2, 3):
        sample = next(left)
        cut = sample.image[: len(sample.image) * (i + 1) // 5]
        add("truncated-jpeg", i, FIRST, "JPEG cut off", "quarantine:truncated_image", sample, jpg=cut)
        empty = b"" if i < 3 else b" \n"
        add("empty-caption", i, FIRST, "caption is empty", "quarantine:empty_caption", next(left), txt=empty)
        tiny = encode(decode(next(left).image).resize((4 * i, 4 * i)))
        add("tiny-image", i, FIRST, "image of 4 to 12 pixels", "drop", next(left), jpg=tiny)
        strip = Image.new("RGB", (64 * 4 * i, 64) if i < 3 else (64, 512))
        for place in range(8):
            strip.paste(decode(next(left).image), (64 * place, 0) if i < 3 else (0, 64 * place))
        add("extreme-aspect", i, SECOND, "side ratio of 4 to 8", "drop", next(left), jpg=encode(strip))
        junk = (b"IMG_0042.JPG", b"x", b"https://www.example.org/pictures/42")[i - 1]
        add("useless-caption", i, SECOND, "caption says nothing", "drop", next(left), txt=junk)
    for i in (1, 2):
        add("missing-caption", i, FIRST, "no .txt", "quarantine:missing_caption", next(left), txt=None)
        png = encode(decode(next(left).image), "PNG")
        add("png-named-jpg", i, FIRST, "PNG with the name .jpg", "keep", next(left), jpg=png)
    sample = next(left)
    add("missing-image", 1, FIRST, "no image", "quarantine:missing_image", sample, jpg=None)
    add(
        "text-named-jpg",
        1,
        FIRST,
        "text with the name .jpg",
        "quarantine:not_an_image",
        next(left),
        jpg=b"not an image\n",
    )
    add(
        "invalid-utf8-caption",
        1,
        SECOND,
        "caption in Latin-1",
        "quarantine:invalid_utf8",
        next(left),
        txt=b"Caf\xe9 au lait",
    )
    add(
        "invalid-json", 1, SECOND, "metadata cut off", "quarantine:invalid_json", next(left), json=b'{"label": "food", '
    )
    for turn in ("first", "second"):
        expected = "keep" if turn == "first" else "quarantine:duplicate_key"
        add("duplicate-key", 1, SECOND, f"key used twice, {turn} time", expected, next(left))
    for i, sample in enumerate(train[40:1640:200], 1):
        shard = FIRST if i % 2 else SECOND
        add("exact-duplicate", i, shard, "same bytes under another key", "drop", sample, of=sample.key)
    changes: list[tuple[str, Callable[[Image.Image], bytes]]] = [
        ("re-encoded", lambda p: encode(p, quality=50)),
        ("resized", lambda p: encode(p.resize((60, 60), Image.Resampling.LANCZOS))),
        ("brighter", lambda p: encode(ImageEnhance.Brightness(p).enhance(1.06))),
        ("as PNG", lambda p: encode(p, "PNG")),
    ]
    for i, sample in enumerate(train[70:1670:200], 1):
        how, change = changes[(i - 1) % 4]
        shard = SECOND if i % 2 else FIRST
        copy = change(decode(sample.image))
        add("near-duplicate", i, shard, f"the same drawing, {how}", "drop", sample, jpg=copy, of=sample.key)
    for i, sample in enumerate(translated, 1):
        language = sample.key
        add(f"caption-{language}", (i + 5) // 6, EMOJI, f"caption in language {language}", "drop", sample)
    return planted


def truncated_tar(
    samples: list[Any], folder: Path, write_tar: Callable[[Path, list[Any]], None]
) -> list[dict[str, Any]]:
    """A shard that ends in the middle of the tenth image: nine samples are whole."""
    planted = []
    for i, sample in enumerate(samples, 1):
        key = f"planted-truncated-tar-{i:02d}"
        defect, expected = ("before the cut", "keep") if i < 10 else ("cut off", "quarantine:truncated_shard")
        planted.append(Planted(key, CUT, f"in a tar that ends too early, {defect}", expected, files(key, sample)))
    path = folder / CUT
    write_tar(path, planted)
    data = path.read_bytes()
    start = data.index(f"{planted[9].key}.jpg".encode()) + 512
    path.write_bytes(data[: start + 300])
    return [each.row() for each in planted[:10]]


def plant_texts(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The train text pairs with broken rows among them, and the lines for `planted.json`."""
    first, second, third = rows[10], rows[20], rows[30]
    broken = [
        ("planted-null-positive-1", "positive is null", "quarantine:missing_text", first["query"], None, None),
        ("planted-null-query-1", "query is null", "quarantine:missing_text", None, first["positive"], None),
        ("planted-empty-query-1", "query is empty", "quarantine:empty_text", "", second["positive"], None),
        ("planted-empty-positive-1", "positive is white space", "quarantine:empty_text", third["query"], " \t", None),
        ("planted-exact-duplicate-1", "the same pair again", "drop", first["query"], first["positive"], first),
        ("planted-exact-duplicate-2", "the same pair again", "drop", second["query"], second["positive"], second),
        ("planted-near-duplicate-1", "differs by case", "drop", third["query"].upper(), third["positive"], third),
        ("planted-near-duplicate-2", "differs by punctuation", "drop", first["query"], first["positive"] + " .", first),
    ]
    out, table = list(rows), []
    for number, (key, defect, expected, query, positive, of) in enumerate(broken, 1):
        out.insert(number * 800, {"synset": key, "query": query, "positive": positive})
        row = {"key": key, "shard": "text/train.parquet", "defect": defect, "expected": expected}
        table.append(row | {"of": of["synset"] if of else None})
    return out, table
