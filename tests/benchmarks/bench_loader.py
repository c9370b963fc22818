"""Loader throughput: Clew's loader beside webdataset with open_clip's transforms, at equal work.

    python -m tests.benchmarks.bench_loader [--samples 600] [--workers 1] [--json FILE]

Work per sample: read, decode, random resized crop to 224 pixels (bicubic), tokenise to CLIP's vocabulary, collate,
normalise to float32. Two corpora: JPEGs of the size of web photos (640 x 480, about 75 KB) and small drawings (96 x
96). webdataset runs as in open_clip's own training script: tar -> shuffle -> decode("pilrgb") -> transform ->
tokenise -> batch, in DataLoader worker processes; Clew with as many threads. The first batch of each is timed apart.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset as wds
from PIL import Image

from cl.batches.loader import Loader
from cl.batches.plan import BatchPlan
from cl.config import parse_config
from cl.corpus import open_corpus
from cl.encoders import ModelConfig, build_inputs
from tests.unit.corpora import image_corpus

MODEL = {
    "embed_dim": 512,
    "towers": {
        "image": {"family": "open_clip", "part": "vision", "name": "ViT-B-32"},
        "text": {"family": "open_clip", "part": "text", "name": "ViT-B-32"},
    },
    "views": {"image": "image", "text": "text"},
}
BATCH = 64
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(1, 3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(1, 3, 1, 1)


def photo(number: int, width: int, height: int) -> bytes:
    """A JPEG with the detail of a photograph: noise at several scales."""
    rng = np.random.default_rng(number)
    total = np.zeros((height, width, 3))
    for cells, strength in ((4, 90), (32, 45), (160, 22)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += strength / 255 * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    out = io.BytesIO()
    Image.fromarray((total + 40).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def clew(root: Path, samples: int, workers: int) -> Iterator[int]:
    """Clew's loader; yields the number of samples of each finished batch."""
    inputs = build_inputs(parse_config(ModelConfig, MODEL, "benchmark"), train=True)
    plan = BatchPlan([open_corpus(str(root))], 0, BATCH)
    for batch in Loader(plan, 0, 1, inputs, steps=samples // BATCH, workers=workers):
        images = batch.views["image"]
        assert isinstance(images, torch.Tensor)
        normalised = (images.float() / 255 - MEAN) / STD
        yield len(normalised)


def webdataset_open_clip(root: Path, samples: int, workers: int) -> Iterator[int]:
    """webdataset with open_clip's transform and tokenizer."""
    transform = open_clip.image_transform(224, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    shards = sorted(str(path) for path in (root / "shards").glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, resampled=True, shardshuffle=False, nodesplitter=wds.split_by_node)
        .shuffle(200, initial=100)
        .decode("pilrgb")
        .rename(image="jpg;png", text="txt")
        .map_dict(image=transform, text=lambda text: tokenizer(text)[0])
        .to_tuple("image", "text")
        .batched(BATCH)
    )
    loader = wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=workers, persistent_workers=True)
    for number, (images, _) in enumerate(loader, 1):
        yield len(images)
        if number == samples // BATCH:
            return


def measure(batches: Iterator[int]) -> dict[str, float]:
    """Samples a second after the first batch, and the seconds the first took."""
    start = time.perf_counter()
    next(batches)
    first = time.perf_counter()
    samples = sum(batches)
    return {"samples_per_second": samples / (time.perf_counter() - first), "first_batch_seconds": first - start}


def main() -> None:
    """Measure both loaders on both corpora, alternating, and print the best of two rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    open_clip.get_tokenizer("ViT-B-32")  # imports and vocabularies are not what is measured
    build_inputs(parse_config(ModelConfig, MODEL, "benchmark"), train=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for corpus, (width, height) in {"photos 640x480": (640, 480), "drawings 96x96": (96, 96)}.items():
            root = Path(folder) / f"{width}"
            made = image_corpus(root, 4, 80, 40, encode=lambda n, w=width, h=height: photo(n, w, h))  # type: ignore[misc]
            size = sum(os.path.getsize(path) for path in (root / "shards").glob("*.tar")) / made.samples
            best: dict[str, dict[str, float]] = {}
            for _ in range(2):
                for loader in (clew, webdataset_open_clip):
                    result = measure(loader(root, options.samples, options.workers))
                    if result["samples_per_second"] > best.get(loader.__name__, {}).get("samples_per_second", 0):
                        best[loader.__name__] = result
            for name, result in best.items():
                rows.append({"corpus": corpus, "bytes_a_sample": round(size), "loader": name, **result})
    print(f"{'corpus':16} {'KB':>4} {'loader':22} {'samples/s':>10} {'first batch':>12}")
    for row in rows:
        print(
            f"{row['corpus']:16} {row['bytes_a_sample'] / 1e3:4.0f} {row['loader']:22} "
            f"{row['samples_per_second']:10.0f} {row['first_batch_seconds']:10.2f} s"
        )
    if options.json:
        options.json.write_text(json.dumps({"workers": options.workers, "batch": BATCH, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
