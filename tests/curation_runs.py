"""A curation with every kind of stage on a small corpus, and how its outputs are compared."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from blake3 import blake3

from cl.config import parse_config
from pipelines.curate import CurateConfig
from tests.curation_corpora import Sample, image_corpus, picture
from tests.unit.test_curation_plan import checkpoint

ROOT = Path(__file__).resolve().parents[1]
STAGES: list[Any] = [
    {"caption": {"min_words": 2}},
    {"image_size": {"min_side": 20}},
    "exact_duplicate",
    {"near_duplicate": {"max_distance": 6, "max_difference": 30}},
    "text_duplicate",
    {"embedding": {"batch_size": 8}},
    {"image_text_score": {"top_fraction": 0.9}},
    {"clusters": {"count": 4, "points": 16, "full": 1}},
    {"semantic_duplicate": {"epsilon": 0.00001}},
    {"balance": {"fraction": 0.8}},
]
TIMES = {"run.json", "funnel.json", "config.yaml"}  # hold times, or the paths of the run


def make_place(root: Path) -> Path:
    """A folder with a corpus of 8 fragments (duplicates, look-alikes, a broken image) and a model."""
    fragments = []
    for f in range(8):
        texts = [f"house {i} by street {f} and lane {20 * f + i}" for i in range(20)]
        samples = [Sample(f"{f}-{i}", text, picture(f * 20 + i)) for i, text in enumerate(texts)]
        samples[3].text = "house"
        samples[4].image = picture(f * 20 + 5)  # equals its neighbour
        samples[6].image = picture(f * 20 + 7, quality=60)  # looks like its neighbour
        samples[8].image = picture(f * 20 + 8, 16, 16)
        samples[12].text = samples[13].text.upper()
        fragments.append(samples)
    fragments[2][11].image = fragments[2][11].image[:900]
    image_corpus(root / "corpus", fragments)
    checkpoint(root / "model")
    return root


def fields_of(place: Path, out: str, **fields: Any) -> dict[str, Any]:
    """The curation of the corpus in `place` into its folder `out`."""
    paths = {name: str(place / name) for name in ("corpus", "model")}
    write = {"shard_mib": 0.1, "chunk_mib": 0.01, "lanes": 4}
    return paths | {"out": str(place / out), "stages": STAGES, "write": write, "partitions": 3} | fields


def config(place: Path, out: str, **fields: Any) -> CurateConfig:
    return parse_config(CurateConfig, fields_of(place, out, **fields), "test")


def tree(root: Path, skip: tuple[str, ...] = (".nodes",)) -> dict[str, str]:
    """Path -> hash of every file, those with times left out."""
    return {
        str(path.relative_to(root)): blake3(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in TIMES and path.relative_to(root).parts[0] not in skip
    }


def launch(
    place: Path, out: str, cpus: int, limit: int | None = None, site: Sequence[str] = (), **fields: Any
) -> subprocess.Popen[bytes]:
    """`clew curate` in a process of its own, with files of at most `limit` bytes and the packages in `site`."""
    path = place / f"{out}.yaml"
    path.write_text(yaml.safe_dump(fields_of(place, out, cpus=cpus, **fields)))
    code = (
        "import sys; from cl.config import load_config; from pipelines.curate import CurateConfig, curate;"
        f"curate(load_config(CurateConfig, 'curate', {str(path)!r}))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *site]),
        "CLEW_QUIET": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)

    def cap() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=cap
    )
