"""A small image-text corpus that a tiny model can learn, written with real files: the tests of training read it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from cl import storage
from cl.corpus import Corpus, Fragment, content_hash, sample_id, sample_schema

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}
PLACES = ("top left", "top right", "bottom left", "bottom right")

TINY_MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "towers": {
        "image": {
            "family": "open_clip",
            "part": "vision",
            "config": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1, "mlp_ratio": 2.0},
        },
        "text": {
            "family": "open_clip",
            "part": "text",
            "config": {"vocab_size": 600, "context_length": 16, "width": 16, "heads": 2, "layers": 1},
        },
    },
    "views": {"image": "image", "text": "text"},
}


def write_corpus(root: Path, samples: int = 90, row_group: int = 8, seed: int = 0) -> str:
    """Write `samples` drawings of a coloured square with its caption; returns the corpus's path."""
    generator = np.random.default_rng(seed)
    shard = root / "shards" / "00000.bin"
    shard.parent.mkdir(parents=True)
    rows = []
    with open(shard, "wb") as file:
        for number in range(samples):
            colour = list(COLOURS)[int(generator.integers(len(COLOURS)))]
            place = int(generator.integers(len(PLACES)))
            pixels = generator.integers(90, 130, (16, 16, 3), dtype=np.uint8)
            top, left = 8 * (place // 2), 8 * (place % 2)
            pixels[top : top + 8, left : left + 8] = COLOURS[colour]
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            data = buffer.getvalue()
            rows.append(
                {
                    "id": sample_id("squares", str(number)),
                    "source": "squares",
                    "key": str(number),
                    "shard": "shards/00000.bin",
                    "content": content_hash(data),
                    "meta": None,
                    "offset": file.tell(),
                    "length": len(data),
                    "format": "png",
                    "width": 16,
                    "height": 16,
                    "text": f"number {number}: a {colour} square at the {PLACES[place]}",
                }
            )
            file.write(data)
    table = pa.Table.from_pylist(rows, schema=sample_schema("image-text"))
    storage.write_table(str(root / "samples" / "00000.parquet"), table, row_group_rows=row_group)
    groups = [min(row_group, samples - start) for start in range(0, samples, row_group)]
    fragment = Fragment(path="samples/00000.parquet", samples=samples, shard="shards/00000.bin", row_groups=groups)
    Corpus(kind="image-text", samples=samples, fragments=[fragment]).write(str(root))
    return str(root)


def tiny_run(corpus: str, out: Path, **fields: Any) -> dict[str, Any]:
    """The fields of a small training run."""
    return {
        "out": str(out),
        "corpus": corpus,
        "model": TINY_MODEL,
        "batch_size": 16,
        "steps": 20,
        "precision": "fp64",
        "log_every": 1,
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 4},
        "checkpoint": {"every_steps": 5},
        "workers": {"count": 0},
    } | fields
