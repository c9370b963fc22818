"""The whole job with every corpus and checkpoint in an S3 bucket, as a process whose Ray workers know the server too.

    python -m tests.s3_chain FOLDER BUCKET       with AWS_ENDPOINT_URL and credentials in the environment

FOLDER/raw holds tars. What is made is compared with the same on the local disk, in FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from blake3 import blake3

from cl import storage
from cl.config import parse_config
from cl.corpus import open_corpus
from cl.training.checkpoint import list_steps
from cl.training.config import TrainConfig
from cl.training.run import train
from cluster.session import ray_session
from pipelines.curate import CurateConfig, curate
from pipelines.ingest import IngestConfig, ingest
from pipelines.remove import remove
from pipelines.verify import verify
from tests.training_corpus import tiny_run

STAGES: list[Any] = [
    "caption",
    "exact_duplicate",
    {"near_duplicate": {"max_distance": 2}},
    {"select": {"column": "width", "min": 1}},
]
PRODUCTS = ("samples", "shards", "annotated", "quarantine", "corpus.json")


def tree(root: str) -> dict[str, str]:
    """Path -> hash of the products in a folder or bucket."""
    fs, path = storage.open_fs(root)
    files = [name for product in PRODUCTS for name in fs.find(f"{path}/{product}")]
    return {name[name.index(path) + len(path) :]: blake3(fs.cat_file(name)).hexdigest() for name in sorted(files)}


def upload(folder: Path, url: str) -> None:
    for file in sorted(folder.iterdir()):
        storage.write_bytes(storage.join(url, file.name), file.read_bytes())


def compare(place: Path, bucket: str) -> None:
    upload(place / "raw", f"{bucket}/raw")
    for root in (str(place), bucket):
        config = IngestConfig(inputs=[f"{root}/raw"], out=f"{root}/corpus", source="s")
        result = ingest(config)
        assert (result.samples, result.reused) == (24, 0), result
        assert ingest(config).reused == 3
    here, there = (open_corpus(f"{root}/corpus").read() for root in (str(place), bucket))
    assert there.drop_columns(["shard"]) == here.drop_columns(["shard"])
    assert there["shard"][0].as_py() == f"{bucket}/raw/s-0.tar"

    for root in (str(place), bucket):
        fields = {
            "corpus": f"{root}/corpus",
            "out": f"{root}/curated",
            "stages": STAGES,
            "write": {"lanes": 4, "shard_mib": 0.02},
        }
        curated = parse_config(CurateConfig, fields, "test")
        assert curate(curated).kept == 21
        assert curate(curated).resumed
        assert verify(f"{root}/curated", deep=True).defects == []
    assert verify(f"{bucket}/corpus", deep=True).defects == []
    mine, theirs = tree(str(place / "curated")), tree(f"{bucket}/curated")
    assert set(mine) == set(theirs)
    differ = {name for name in mine if mine[name] != theirs[name]}
    assert all(name.startswith("/annotated/") for name in differ), differ  # which say where the bytes came from

    losses: list[Any] = []
    for root in (str(place), bucket):
        fields = tiny_run(f"{root}/curated", place / f"model-{len(losses)}", steps=4, batch_size=8)
        fields["checkpoint"] = {"every_steps": 2, "path": f"{root}/checkpoints"}
        trained = train(parse_config(TrainConfig, fields, "test"))
        assert list_steps(f"{root}/checkpoints") == [4, 2]
        assert trained.checkpoint == f"{root}/checkpoints/step-00000004"
        fs, path = storage.open_fs(f"{root}/checkpoints/step-00000004")
        fs.rm(path, recursive=True)  # as if it had been killed before the last one
        again = train(parse_config(TrainConfig, fields, "test"), resume=True)
        assert again.loss_last == trained.loss_last
        losses.append(again.loss_last)
    assert losses[0] == losses[1]

    gone = open_corpus(f"{bucket}/curated").read(["id"])["id"][0].as_py()
    (place / "ids.txt").write_text(gone)
    for each in remove([f"{bucket}/corpus", f"{bucket}/curated"], str(place / "ids.txt")):
        assert each.removed == 1
    assert verify(f"{bucket}/curated", deep=True).defects == []
    assert gone not in open_corpus(f"{bucket}/corpus").read(["id"])["id"].to_pylist()
    assert ingest(config).reasons["removed"] == 1


def half_written_is_not_there(bucket: str) -> None:
    """A put that raises leaves what was there before, and inside it another one is whole."""
    storage.write_bytes(f"{bucket}/file", b"old")
    try:
        with storage.atomic_write(f"{bucket}/file") as file:
            file.write(b"half")
            storage.write_bytes(f"{bucket}/other", b"whole")
            raise KeyError
    except KeyError:
        pass
    fs, path = storage.open_fs(bucket)
    assert fs.cat_file(f"{path}/file") == b"old"
    assert fs.cat_file(f"{path}/other") == b"whole"


if __name__ == "__main__":
    half_written_is_not_there(sys.argv[2])
    with ray_session(num_cpus=2):
        compare(Path(sys.argv[1]), sys.argv[2])
