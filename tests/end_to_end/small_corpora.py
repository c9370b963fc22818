"""Small raw corpora for tests: real image bytes in a real shard, written with the package's own corpus format."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from cl import storage
from cl.corpus import Corpus, Fragment, content_hash, sample_id, sample_schema, text_pair_content

Pair = tuple[bytes, str, dict[str, object]]  # encoded image, caption, metadata


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(seed: int, size: int = 16) -> bytes:
    """A PNG of random pixels."""
    return png(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def write_image_corpus(root: Path, samples: list[Pair], source: str = "test", rows: int = 16) -> str:
    """A corpus whose shard is the images one after another; the byte ranges are all that readers know."""
    shard = root / "shards" / "00000.bin"
    shard.parent.mkdir(parents=True)
    records, offset = [], 0
    with open(shard, "wb") as file:
        for number, (image, text, meta) in enumerate(samples):
            file.write(image)
            key = f"{number:05d}"
            records.append(
                {
                    "id": sample_id(source, key),
                    "source": source,
                    "key": key,
                    "shard": "shards/00000.bin",
                    "content": content_hash(image),
                    "meta": json.dumps(meta),
                    "offset": offset,
                    "length": len(image),
                    "format": "png",
                    "width": 16,
                    "height": 16,
                    "text": text,
                }
            )
            offset += len(image)
    table = pa.Table.from_pylist(records, schema=sample_schema("image-text"))
    return _write(root, "image-text", table, "shards/00000.bin", rows)


def write_text_corpus(root: Path, pairs: list[tuple[str, str]], source: str = "test", rows: int = 16) -> str:
    """A corpus of text pairs."""
    records = [
        {
            "id": sample_id(source, str(number)),
            "source": source,
            "key": str(number),
            "shard": "samples/00000.parquet",
            "content": text_pair_content(anchor, positive),
            "meta": None,
            "anchor": anchor,
            "positive": positive,
            "negatives": None,
        }
        for number, (anchor, positive) in enumerate(pairs)
    ]
    table = pa.Table.from_pylist(records, schema=sample_schema("text-text"))
    return _write(root, "text-text", table, "samples/00000.parquet", rows)


def _write(root: Path, kind: str, table: pa.Table, shard: str, rows: int) -> str:
    storage.write_table(str(root / "samples" / "00000.parquet"), table, row_group_rows=rows)
    groups = [min(rows, len(table) - start) for start in range(0, len(table), rows)]
    fragment = Fragment(path="samples/00000.parquet", samples=len(table), shard=shard, row_groups=groups)
    Corpus(kind=kind, samples=len(table), fragments=[fragment]).write(str(root))
    return str(root)
