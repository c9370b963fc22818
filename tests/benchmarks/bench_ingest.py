"""Samples a second of reading a shard: Clew's reader beside tarfile and webdataset, for the same work on the same tar.

    python tests/benchmarks/bench_ingest.py [--samples 5000] [--image-bytes 9000] [--repeats 3] [--out result.json]

Two jobs, each in one process from the page cache, the best of some repeats, runs interleaved:
- bytes: give image, caption and metadata of every sample, in memory;
- facts: that, and the image's size from its header, its content hash, and the metadata parsed - what ingest keeps.
Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cl.corpus import content_hash
from pipelines.images import MAX_PIXELS
from pipelines.readers.blocks import BlockReader
from pipelines.readers.tar import TarReader
from pipelines.tar import Member, scan, split_name


def make_tar(path: Path, samples: int, image_bytes: int) -> None:
    """A webdataset shard of noise: JPEGs of about `image_bytes` bytes, captions, small JSON."""
    random = np.random.default_rng(0)
    side = max(16, round((image_bytes / 1.05) ** 0.5))
    images = []
    for _ in range(32):
        out = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(out, "JPEG", quality=60)
        images.append(out.getvalue())
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(samples):
            caption = f"sample number {number} of a benchmark".encode()
            meta = json.dumps({"number": number, "url": f"https://example.org/{number}"}).encode()
            for suffix, data in (("jpg", images[number % 32]), ("txt", caption), ("json", meta)):
                header = tarfile.TarInfo(f"{number:09d}.{suffix}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))


def facts(parts: dict[str, bytes]) -> tuple[int, int, str, str, object]:
    """What ingest keeps of a sample, in the usual way."""
    with Image.open(io.BytesIO(parts["jpg"])) as image:
        width, height = image.size
    return width, height, content_hash(parts["jpg"]), parts["txt"].decode(), json.loads(parts["json"])


def with_tarfile(path: Path, full: bool) -> int:
    count, key, parts = 0, None, dict[str, bytes]()
    with tarfile.open(path, "r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            stem, _, suffix = member.name.partition(".")
            if stem != key:
                key, parts = stem, {}
            parts[suffix] = file.read()
            if len(parts) == 3:
                count += 1
                if full:
                    facts(parts)
    return count


def with_webdataset(path: Path, full: bool) -> int:
    import webdataset

    count = 0
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        count += 1
        if full:
            facts(sample)
    return count


def with_clew(path: Path, full: bool) -> int:
    with BlockReader(str(path)) as reader:
        if full:
            return sum(1 for _ in TarReader({}, MAX_PIXELS).read(reader))
        count, key, parts = 0, "", dict[str, bytes]()
        for member in scan(reader):
            assert isinstance(member, Member)
            stem, suffix = split_name(member.name)
            if stem != key:
                key, parts = stem, {}
            parts[suffix] = reader.read_at(member.offset, member.size)
            count += len(parts) == 3
        return count


READERS: dict[str, Callable[[Path, bool], int]] = {
    "tarfile": with_tarfile,
    "webdataset": with_webdataset,
    "clew": with_clew,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--image-bytes", type=int, default=9000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    best: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        make_tar(path, options.samples, options.image_bytes)
        size = path.stat().st_size
        for _ in range(options.repeats):
            for job in ("bytes", "facts"):
                for name, read in READERS.items():
                    start = time.perf_counter()
                    count = read(path, job == "facts")
                    assert count == options.samples, (name, count)
                    rate = count / (time.perf_counter() - start)
                    best[name, job] = max(best.get((name, job), 0.0), rate)
    print(f"{options.samples} samples, {size / options.samples:.0f} bytes each; samples/s, best of {options.repeats}")
    print(f"{'reader':<12}{'bytes':>12}{'':>8}{'facts':>12}")
    rows = []
    for name in READERS:
        ratios = {job: best[name, job] / best["webdataset", job] for job in ("bytes", "facts")}
        print(
            f"{name:<12}{best[name, 'bytes']:>12,.0f}{ratios['bytes']:>7.1f}x"
            f"{best[name, 'facts']:>12,.0f}{ratios['facts']:>7.1f}x"
        )
        rates = {job: round(best[name, job], 1) for job in ("bytes", "facts")}
        rows.append({"reader": name, "samples_per_second": rates, "ratio_to_webdataset": ratios})
    if options.out:
        result = {"samples": options.samples, "bytes_per_sample": size / options.samples, "readers": rows}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
