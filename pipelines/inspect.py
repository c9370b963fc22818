"""`clew inspect`: any sample by its id, with both planes and what became of it; any batch of a training run.

    samples = inspect_samples("runs/curated", ["0f3a9c"])     # an id or its beginning
    batch = inspect_batch("runs/model", epoch=0, step=17)

A curated corpus knows the rows that it dropped as well: they are found among its annotated rows, and their bytes in the
corpus that it was made from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from cl import storage
from cl.batches.arranged import make_plan
from cl.config import load_config, read_yaml
from cl.corpus import VIEWS, Corpus, content_hash, open_corpus
from cl.errors import ConfigError, DataError
from pipelines.heavy import UndecodableError, decode, read_ranges
from pipelines.write import EXTENSIONS

ID_START = re.compile(r"[0-9a-f]{4,32}")
MAX_FOUND = 20  # samples that one beginning of an id may show
STATUS = ("drop_stage", "drop_reason", "quarantined")


class ImageView(BaseModel):
    """The bytes of a sample's image."""

    shard: str  # URL
    offset: int
    length: int  # bytes
    there: bool  # whether the shard has that many bytes there
    same: bool  # whether they are the bytes that were ingested
    decoded: str  # height x width in pixels of the scaled decoding, or why it cannot be decoded
    saved: str | None = None  # file that they were written to


class SampleView(BaseModel):
    """All that is known of a sample."""

    id: str
    corpus: str
    outcome: str  # kept, or the stage and reason that dropped or quarantined it
    fragment: str  # file of the light plane, or of the annotated rows
    row: int
    row_group: int | None  # None: in the annotated rows alone
    columns: dict[str, Any]
    image: ImageView | None = None
    made_from: list[str] = []  # the corpora before this one, the nearest first


class BatchRow(BaseModel):
    """One sample of a step."""

    place: int  # in the global batch
    worker: int
    id: str
    source: str
    key: str
    text: str  # what the sample's text views hold


class BatchView(BaseModel):
    """The samples of one step in their order."""

    run: str
    epoch: int
    step: int
    steps_per_epoch: int
    samples: list[BatchRow]


def inspect_samples(root: str, ids: Sequence[str], save: str | None = None) -> list[SampleView]:
    """Everything about samples of a corpus.

    Args:
        ids: ids of 32 hex digits, or beginnings of at least 4.
        save: folder that the images are written to, as ID.jpg and so on.

    Raises:
        ConfigError: something that cannot be the beginning of an id.
        DataError: no such sample, no such corpus.
    """
    for name in ids:
        if not ID_START.fullmatch(name):
            raise ConfigError(f"{name!r} is no id: give 32 hex digits, or the first ones, at least 4.")
    corpus = open_corpus(root)
    before = list(_ancestors(corpus.root))
    views = []
    for name in ids:
        found = list(_kept(corpus, name)) or list(_dropped(corpus, name))
        if not found:
            raise DataError(f"{corpus.root} has no sample whose id starts with {name}, neither kept nor dropped.")
        if len(found) > MAX_FOUND:
            raise DataError(f"{len(found)} samples of {corpus.root} have ids that start with {name}: give more digits.")
        views += found
    return [_complete(corpus, view, before, save) for view in views]


def _ancestors(root: str) -> Iterator[str]:
    """The corpora that a corpus was made from, by the configs that its runs left."""
    seen = {root}
    while True:
        path = storage.join(root, "config.yaml")
        if not storage.is_local(root) or not os.path.exists(path):
            return
        parent = read_yaml(Path(storage.open_fs(path)[1])).get("corpus")
        if not isinstance(parent, str) or parent in seen:
            return
        seen.add(parent)
        yield parent
        root = parent


def _matching(url: str, start: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, its columns) of the rows of a parquet file whose id has a beginning; ids are read first."""
    ids = storage.read_table(url, ["id"])["id"]
    rows = pc.indices_nonzero(pc.starts_with(ids, start)).to_pylist()
    if rows:
        table = storage.read_table(url).take(pa.array(rows))
        yield from zip(rows, table.to_pylist(), strict=True)


def _kept(corpus: Corpus, start: str) -> Iterator[SampleView]:
    for fragment in corpus.fragments:
        for row, columns in _matching(corpus.fragment_url(fragment), start):
            group, before = 0, 0
            while before + fragment.row_groups[group] <= row:
                before += fragment.row_groups[group]
                group += 1
            yield SampleView(
                id=columns["id"],
                corpus=corpus.root,
                outcome="kept",
                fragment=fragment.path,
                row=row,
                row_group=group,
                columns=columns,
            )


def _dropped(corpus: Corpus, start: str) -> Iterator[SampleView]:
    folder = storage.join(corpus.root, "annotated")
    for name in storage.list_files(folder, ".parquet"):
        for row, columns in _matching(storage.join(folder, name), start):
            stage, reason, quarantined = (columns.pop(each) for each in STATUS)
            outcome = f"{'quarantined' if quarantined else 'dropped'} by {stage}: {reason}" if stage else "kept"
            yield SampleView(
                id=columns["id"],
                corpus=corpus.root,
                outcome=outcome,
                fragment=f"annotated/{name}",
                row=row,
                row_group=None,
                columns={each: value for each, value in columns.items() if value is not None},
            )


def _complete(corpus: Corpus, view: SampleView, before: list[str], save: str | None) -> SampleView:
    """With the image, and where the sample comes from."""
    image = None
    if corpus.kind == "image-text" and "offset" in view.columns:
        owner = corpus.root if view.row_group is not None else (before or [corpus.root])[0]
        image = _image(storage.join(owner, view.columns["shard"]), view, save)
    return view.model_copy(update={"image": image, "made_from": before})


def _image(url: str, view: SampleView, save: str | None) -> ImageView:
    columns = view.columns
    found = ImageView(
        shard=url, offset=columns["offset"], length=columns["length"], there=False, same=False, decoded="", saved=None
    )
    data = None
    if storage.exists(url):
        [data] = read_ranges(url, [found.offset], [found.length])
    if data is None:
        return found.model_copy(update={"decoded": "the bytes are not there"})
    try:
        height, width = decode(data).shape[:2]
        decoded = f"{height} x {width}"
    except UndecodableError as error:
        decoded = f"cannot be decoded: {error}"
    saved = None
    if save is not None:
        saved = storage.join(save, f"{view.id}.{EXTENSIONS[columns['format']]}")
        storage.write_bytes(saved, data)
    same = content_hash(data) == columns["content"]
    return found.model_copy(update={"there": True, "same": same, "decoded": decoded, "saved": saved})


def inspect_batch(run: str, epoch: int, step: int) -> BatchView:
    """The samples of one step of a training run, in the order of the global batch.

    Raises:
        ConfigError: no such step.
        DataError: the folder holds no training run, or its corpora are not there.
    """
    from cl.training.config import TrainConfig

    path = os.path.join(run, "config.yaml")
    record = storage.join(run, "run.json")
    if not os.path.exists(path) or not storage.exists(record) or storage.read_json(record).get("command") != "train":
        raise DataError(f"{run} holds no training run: it has no run.json and config.yaml of `clew train`.")
    cfg = load_config(TrainConfig, "train", path)
    corpora = [open_corpus(each) for each in cfg.corpus_paths]
    plan = make_plan(corpora, cfg.seed, cfg.batch_size, cfg.mixture, cfg.arrange)
    if epoch < 0 or not 0 <= step < plan.steps_per_epoch:
        raise ConfigError(
            f"There is no step {step} of epoch {epoch}: an epoch has steps 0 to {plan.steps_per_epoch - 1}."
        )
    samples = plan.step(epoch, step)
    world = max(cfg.workers.count, 1)
    ends = [plan.part_bounds(rank, world)[1] for rank in range(world)]
    texts = [name for name, modality in VIEWS[plan.kind].items() if modality == "text"]
    chunks: dict[int, pa.Table] = {}
    rows = []
    for place, (chunk, row) in enumerate(zip(samples.chunk.tolist(), samples.row.tolist(), strict=True)):
        if chunk not in chunks:
            where = plan.chunk(chunk)
            corpus = plan.corpora[where.corpus]
            with storage.open_parquet(corpus.fragment_url(corpus.fragments[where.fragment])) as file:
                chunks[chunk] = file.read_row_group(where.row_group, columns=["id", "source", "key", *texts])
        values = chunks[chunk].slice(row, 1).to_pylist()[0]
        text = " | ".join(values.pop(name) for name in texts)
        worker = next(rank for rank, end in enumerate(ends) if place < end)
        rows.append(BatchRow(place=place, worker=worker, text=text, **values))
    return BatchView(run=run, epoch=epoch, step=step, steps_per_epoch=plan.steps_per_epoch, samples=rows)
