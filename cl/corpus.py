"""What a corpus is on disk: the contract between `pipelines`, which writes corpora, and `cl`, which reads them.

    CORPUS/
      corpus.json            what it is: kind, counts, fragments (written last: a corpus without it is unfinished)
      samples/*.parquet      the light plane: one row a sample, one fragment a shard, row groups are read units
      quarantine/*.parquet   what could not be used: shard, key, stage, reason
      shards/*.tar           the heavy plane, if the corpus owns its bytes; else rows point to where they are
      tombstones.parquet     ids that were taken down (cl/tombstones.py)

There is one format before and after curation: what `clew ingest` writes (heavy bytes stay where they are) and
what `clew curate` writes (bytes copied into new, shuffled shards) can be trained on, evaluated on, embedded and
curated again.

A sample's id is 128 bits (32 hex digits) of blake3 over its source and key and never changes. `content` is the
same length over its content (the encoded image, or for text pairs the normalised texts).
"""

from __future__ import annotations

from typing import Any, Literal

import pyarrow as pa
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, ValidationError

from cl import storage
from cl.errors import DataError
from cl.tombstones import refuse_unfinished_removal

FORMAT = "clew-corpus"
VERSION = 1
Kind = Literal["image-text", "text-text"]

COMMON_FIELDS = [
    pa.field("id", pa.string(), nullable=False),  # 32 hex digits, hash of source and key
    pa.field("source", pa.string(), nullable=False),  # name of the data set it came from
    pa.field("key", pa.string(), nullable=False),  # key in its source
    pa.field("shard", pa.string(), nullable=False),  # path within the corpus, or absolute path or URL
    pa.field("content", pa.string(), nullable=False),  # 32 hex digits, hash of the content
    pa.field("meta", pa.string()),  # the sample's own metadata, JSON text
]
IMAGE_FIELDS = [
    pa.field("offset", pa.int64(), nullable=False),  # bytes from the start of the shard to the image
    pa.field("length", pa.int64(), nullable=False),  # bytes of the image
    pa.field("format", pa.string(), nullable=False),  # jpeg, png, webp, gif: by its bytes, not its name
    pa.field("width", pa.int32(), nullable=False),  # pixels, read from the header
    pa.field("height", pa.int32(), nullable=False),
    pa.field("text", pa.string(), nullable=False),  # the caption
]
TEXT_FIELDS = [
    pa.field("anchor", pa.string(), nullable=False),
    pa.field("positive", pa.string(), nullable=False),
    pa.field("negatives", pa.list_(pa.string())),  # explicit hard negatives, any number
]
# In corpora written for training: equal content shares a lane (see cl/batches/plan.py).
LANE_FIELD = pa.field("lane", pa.int32(), nullable=False)

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.string(), nullable=False),
        pa.field("key", pa.string()),  # null when the shard broke before a key was known
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
    ]
)

VIEWS: dict[str, dict[str, str]] = {
    "image-text": {"image": "image", "text": "text"},  # view name -> modality
    "text-text": {"anchor": "text", "positive": "text"},
}


def sample_schema(kind: Kind) -> pa.Schema:
    """The columns that every corpus of a kind has; curation appends others."""
    return pa.schema(COMMON_FIELDS + (IMAGE_FIELDS if kind == "image-text" else TEXT_FIELDS))


def sample_id(source: str, key: str) -> str:
    """The stable 128-bit id of a sample, 32 hex digits."""
    return blake3(f"{source}\0{key}".encode()).hexdigest(length=16)


def content_hash(data: bytes) -> str:
    """The 128-bit hash of a sample's content, 32 hex digits."""
    return blake3(data).hexdigest(length=16)


def normal_text(text: str) -> str:
    """A text as it is compared: white space and case do not count."""
    return " ".join(text.split()).casefold()


def text_pair_content(anchor: str, positive: str) -> str:
    """The content hash of a text pair."""
    return content_hash(f"{normal_text(anchor)}\0{normal_text(positive)}".encode())


class Fragment(BaseModel):
    """One file of the light plane."""

    model_config = ConfigDict(frozen=True)
    path: str  # within the corpus
    samples: int
    shard: str  # the shard its rows point to, as in the column of that name
    row_groups: list[int]  # rows of each row group: the units of reading (chunks)
    lanes: list[int] | None = None  # the lane of each row group, in corpora written for training


class Corpus(BaseModel):
    """The manifest of a corpus, with the place it was read from."""

    model_config = ConfigDict(frozen=True)
    format: Literal["clew-corpus"] = "clew-corpus"
    version: Literal[1] = 1
    kind: Kind
    samples: int
    quarantined: int = 0
    lanes: int | None = None  # V, the number of lanes, in corpora written for training
    fragments: list[Fragment]
    root: str = ""  # filled in by `open_corpus`; not stored

    def fragment_url(self, fragment: Fragment) -> str:
        return storage.join(self.root, fragment.path)

    def shard_url(self, shard: str) -> str:
        return storage.join(self.root, shard)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """The whole light plane in fragment order; for corpora that fit in memory (evaluation, reports, tests)."""
        return pa.concat_tables(storage.read_table(self.fragment_url(f), columns) for f in self.fragments)

    def write(self, root: str) -> None:
        """Commit the corpus: the manifest is written last and atomically."""
        storage.write_json(storage.join(root, "corpus.json"), self.model_dump(exclude={"root"}))


def open_corpus(root: str, unfinished_removal: bool = False) -> Corpus:
    """Read and check a corpus's manifest.

    Args:
        unfinished_removal: open a corpus that samples are being removed from, which only `clew remove` may do.

    Raises:
        DataError: nothing there, unfinished, another format, a newer version, no samples, or a removal is not finished.
    """
    root = str(root).rstrip("/")
    if not unfinished_removal:
        refuse_unfinished_removal(root)
    path = storage.join(root, "corpus.json")
    if not storage.exists(root):
        raise DataError(f"Corpus {root} does not exist.")
    if not storage.exists(path):
        raise DataError(f"{root} is not a finished corpus: it has no corpus.json (make one with `clew ingest`).")
    data: Any = storage.read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(f"{path} is not the manifest of a Clew corpus.")
    if data.get("version") != VERSION:
        raise DataError(f"{path} has version {data.get('version')!r}; this Clew reads version {VERSION}.")
    try:
        corpus = Corpus(**data | {"root": root})
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{path}: field {'.'.join(map(str, first['loc']))!r}: {first['msg']}.") from error
    if corpus.samples == 0 and not unfinished_removal:
        raise DataError(f"Corpus {root} has no samples ({corpus.quarantined} were quarantined; see {root}/quarantine).")
    return corpus
