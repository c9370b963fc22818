"""Small corpora on disk for tests, in the format of cl/corpus.py."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from cl import storage
from cl.corpus import (
    LANE_FIELD,
    Corpus,
    Fragment,
    content_hash,
    open_corpus,
    sample_id,
    sample_schema,
    text_pair_content,
)


def encoded_image(seed: int, width: int, height: int, kind: str = "JPEG") -> bytes:
    """A smooth random picture: neighbours are alike, as in real ones, so that scaled decoding can be compared."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def image_corpus(
    root: Path,
    fragments: int = 3,
    rows: int = 40,
    row_group: int = 10,
    broken: tuple[int, ...] = (),
    encode: Callable[[int], bytes] | None = None,
) -> Corpus:
    """An image-text corpus with its own shards; sample numbers in `broken` have a truncated image.

    Pictures are small, of any size and some of them PNG, or the JPEGs that `encode` makes of a sample's number.
    """
    made = []
    for f in range(fragments):
        table: dict[str, list] = {name: [] for name in sample_schema("image-text").names}
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for r in range(rows):
                number = f * rows + r
                kind = "PNG" if number % 5 == 0 else "JPEG"
                width, height = 60 + number % 50, 60 + number % 30
                if encode is not None:
                    kind, data = "JPEG", encode(number)
                else:
                    data = encoded_image(number, width, height, kind)
                if number in broken:
                    data = data[: len(data) // 2]
                text = f"picture number {number} of the test corpus"
                offset = archive.tell() + 512
                for suffix, content in (("png" if kind == "PNG" else "jpg", data), ("txt", text.encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                values = {
                    "id": sample_id("test", f"{number:06d}"),
                    "source": "test",
                    "key": f"{number:06d}",
                    "shard": f"shards/{f:05d}.tar",
                    "content": content_hash(data),
                    "meta": None,
                    "offset": offset,
                    "length": len(data),
                    "format": kind.lower(),
                    "width": width,
                    "height": height,
                    "text": text,
                }
                for name, value in values.items():
                    table[name].append(value)
        storage.write_bytes(str(root / f"shards/{f:05d}.tar"), archive.getvalue())
        made.append(_fragment(root, f, pa.table(table, schema=sample_schema("image-text")), row_group))
    Corpus(kind="image-text", samples=fragments * rows, fragments=made).write(str(root))
    return open_corpus(str(root))


def text_corpus(
    root: Path,
    rows: int = 100,
    row_group: int = 10,
    pairs: list[tuple[str, str]] | None = None,
    negatives: list[list[str] | None] | None = None,
) -> Corpus:
    """A text-text corpus of numbered pairs, or of those given."""
    if pairs is None:
        pairs = [(f"question {i} about things", f"answer {i}, which is {'long ' * (i % 7)}") for i in range(rows)]
    rows = len(pairs)
    table = pa.table(
        {
            "id": [sample_id("test", str(i)) for i in range(rows)],
            "source": ["test"] * rows,
            "key": [str(i) for i in range(rows)],
            "shard": ["samples/00000.parquet"] * rows,
            "content": [text_pair_content(*pair) for pair in pairs],
            "meta": [None] * rows,
            "anchor": [pair[0] for pair in pairs],
            "positive": [pair[1] for pair in pairs],
            "negatives": negatives or [None] * rows,
        },
        schema=sample_schema("text-text"),
    )
    Corpus(kind="text-text", samples=rows, fragments=[_fragment(root, 0, table, row_group)]).write(str(root))
    return open_corpus(str(root))


def described_corpus(chunks: list[tuple[int, int]], kind: str = "text-text") -> Corpus:
    """A manifest alone: one fragment with (rows, lane) for each row group; nothing of it is on disk."""
    rows = [c[0] for c in chunks]
    fragment = Fragment(
        path="samples/00000.parquet", samples=sum(rows), shard="x", row_groups=rows, lanes=[c[1] for c in chunks]
    )
    return Corpus(
        kind=kind, samples=sum(rows), lanes=max(c[1] for c in chunks) + 1, fragments=[fragment], root="memory"
    )


def _fragment(root: Path, number: int, table: pa.Table, row_group: int) -> Fragment:
    assert LANE_FIELD.name not in table.column_names  # raw: lanes go by row group
    path = f"samples/{number:05d}.parquet"
    storage.write_table(str(root / path), table, row_group)
    full, rest = divmod(table.num_rows, row_group)
    shard = table["shard"][0].as_py()
    return Fragment(
        path=path, samples=table.num_rows, shard=shard, row_groups=[row_group] * full + ([rest] if rest else [])
    )
