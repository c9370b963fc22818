"""`clew verify`: is a corpus what its manifest says, down to the bytes of its images?

    result = verify("runs/curated", deep=True)

Looked at are the manifest and its counts, every fragment's row groups, columns, types and nulls, every sample's id
(hash of source and key), content hash and place in its shard, the quarantine, the lanes, and over the whole corpus the
ids, which must differ, and equal contents, which must share a lane. With `deep` every image is decoded too. Nothing is
changed.

Fragments are read in threads, images by ranged reads in the order of their bytes. Beside one fragment a thread, 40
bytes a sample are held.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from cl import storage
from cl.corpus import (
    LANE_FIELD,
    QUARANTINE_SCHEMA,
    Corpus,
    Fragment,
    content_hash,
    open_corpus,
    sample_id,
    sample_schema,
    text_pair_content,
)
from cl.errors import DataError
from cl.progress import progress
from pipelines.heavy import UndecodableError, decode, read_ranges
from pipelines.keyed import id_text, id_words

HEX = "^[0-9a-f]{32}$"
EXAMPLES = 5  # defects of one kind that are named in one fragment; the rest is counted


class Defect(BaseModel):
    """Something that is not as it should be."""

    where: str  # file within the corpus
    defect: str  # one sentence


class VerifyResult(BaseModel):
    """What was looked at, and what was found."""

    corpus: str
    samples: int
    fragments: int
    image_bytes: int  # read and hashed
    decoded: int  # images
    defects: list[Defect]


@dataclass
class _Found:
    """What a look at one fragment gives."""

    defects: list[Defect] = field(default_factory=list)
    ids: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    content: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    lane: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    image_bytes: int = 0
    decoded: int = 0

    def add(self, where: str, sentence: str) -> None:
        self.defects.append(Defect(where=where, defect=sentence))

    def rows(self, where: str, bad: np.ndarray, names: Sequence[str], sentence: Callable[[int], str]) -> None:
        """One defect a bad row (bool [n]), up to `EXAMPLES` of them, and one that counts the others."""
        places = np.flatnonzero(bad).tolist()
        for row in places[:EXAMPLES]:
            self.add(where, f"sample {names[row]} (row {row}): {sentence(row)}")
        if len(places) > EXAMPLES:
            self.add(where, f"{len(places) - EXAMPLES} more samples have the same defect as the ones before")


def verify(root: str, deep: bool = False, threads: int | None = None) -> VerifyResult:
    """Look at everything that a corpus holds.

    Args:
        deep: decode every image.
        threads: None: the cores of this machine.

    Raises:
        DataError: there is no corpus, or its manifest cannot be read.
    """
    corpus = open_corpus(root)
    found: list[_Found] = []
    with (
        ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool,
        progress("Verifying", total=corpus.samples, unit="samples") as bar,
    ):
        for fragment, each in zip(
            corpus.fragments, pool.map(lambda one: look(corpus, one, deep), corpus.fragments), strict=True
        ):
            found.append(each)
            bar.advance(fragment.samples)
    defects = [*_manifest(corpus), *(defect for each in found for defect in each.defects), *_whole(corpus, found)]
    return VerifyResult(
        corpus=corpus.root,
        samples=corpus.samples,
        fragments=len(corpus.fragments),
        image_bytes=sum(each.image_bytes for each in found),
        decoded=sum(each.decoded for each in found),
        defects=defects,
    )


def _manifest(corpus: Corpus) -> Iterator[Defect]:
    """What the manifest says of itself and of its folders."""
    where = "corpus.json"
    total = sum(fragment.samples for fragment in corpus.fragments)
    if total != corpus.samples:
        yield Defect(where=where, defect=f"says {corpus.samples} samples, but its fragments have {total}.")
    paths = [fragment.path for fragment in corpus.fragments]
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        yield Defect(where=where, defect=f"lists {path} twice.")
    listed = {path.partition("/")[2] for path in paths if path.startswith("samples/")}
    for name in storage.list_files(storage.join(corpus.root, "samples"), ".parquet"):
        if name not in listed:
            yield Defect(where=f"samples/{name}", defect="is not in corpus.json.")
    quarantined = 0
    folder = storage.join(corpus.root, "quarantine")
    for name in storage.list_files(folder, ".parquet"):
        try:
            quarantined += storage.read_table(storage.join(folder, name), list(QUARANTINE_SCHEMA.names)).num_rows
        except DataError as error:
            yield Defect(where=f"quarantine/{name}", defect=str(error))
    if quarantined != corpus.quarantined:
        yield Defect(
            where=where, defect=f"says {corpus.quarantined} quarantined, but the quarantine has {quarantined} rows."
        )


def look(corpus: Corpus, fragment: Fragment, deep: bool) -> _Found:
    """Look at one fragment and the images that it points to."""
    found = _Found()
    try:
        table = _table(corpus, fragment, found)
        if table is not None:
            _rows(corpus, fragment, table, found)
            if corpus.kind == "image-text":
                _images(corpus, table, fragment.path, deep, found)
    except (DataError, pa.ArrowException, OSError) as error:
        found.add(fragment.path, str(error))
    return found


def _table(corpus: Corpus, fragment: Fragment, found: _Found) -> pa.Table | None:
    """The fragment's rows, or None if they are not those of a corpus."""
    url, where = corpus.fragment_url(fragment), fragment.path
    with storage.open_parquet(url) as file:
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        table = file.read()
    if groups != fragment.row_groups:
        found.add(where, f"has row groups of {groups[:8]} rows, but corpus.json says {fragment.row_groups[:8]}.")
    if table.num_rows != fragment.samples:
        found.add(where, f"has {table.num_rows} rows, but corpus.json says {fragment.samples}.")
    wanted = list(sample_schema(corpus.kind)) + ([LANE_FIELD] if fragment.lanes is not None else [])
    whole = True
    for each in wanted:
        if each.name not in table.column_names:
            found.add(where, f"has no column {each.name!r}.")
            whole = False
        elif table.schema.field(each.name).type != each.type:
            kind = table.schema.field(each.name).type
            found.add(where, f"column {each.name!r} is of type {kind}, but must be {each.type}.")
            whole = False
        elif not each.nullable and table[each.name].null_count:
            found.add(where, f"column {each.name!r} has {table[each.name].null_count} nulls.")
            whole = False
    return table if whole else None


def _rows(corpus: Corpus, fragment: Fragment, table: pa.Table, found: _Found) -> None:
    """Ids, contents and lanes."""
    where = fragment.path
    ids, content = table["id"].to_pylist(), table["content"].to_pylist()
    odd = ~(_matches(table["id"]) & _matches(table["content"]))
    found.rows(where, odd, ids, lambda row: f"its id or content {content[row]!r} does not have 32 hex digits.")
    if odd.any():
        return
    keys = list(zip(table["source"].to_pylist(), table["key"].to_pylist(), strict=True))
    other = np.array([sample_id(*key) != name for key, name in zip(keys, ids, strict=True)], bool)
    found.rows(where, other, ids, lambda row: f"its id is not that of source {keys[row][0]!r}, key {keys[row][1]!r}.")
    if corpus.kind == "text-text":
        texts = list(zip(table["anchor"].to_pylist(), table["positive"].to_pylist(), strict=True))
        changed = np.array([text_pair_content(*pair) != name for pair, name in zip(texts, content, strict=True)], bool)
        found.rows(where, changed, ids, lambda row: "its content hash is not that of its texts.")
    found.ids, found.content = id_words(ids), id_words(content)
    if fragment.lanes is not None:
        found.lane = table["lane"].to_numpy().astype(np.int64)
        if len(fragment.lanes) != len(fragment.row_groups):
            found.add(
                where, f"has {len(fragment.row_groups)} row groups, but {len(fragment.lanes)} lanes in corpus.json."
            )
        elif sum(fragment.row_groups) == len(found.lane):
            lanes = np.repeat(fragment.lanes, fragment.row_groups)
            found.rows(
                where,
                found.lane != lanes,
                ids,
                lambda row: f"is of lane {found.lane[row]}, its row group {lanes[row]}.",
            )
        if corpus.lanes is not None and len(found.lane) and not 0 <= found.lane.max() < corpus.lanes:
            found.add(where, f"has lane {found.lane.max()}, but corpus.json says there are {corpus.lanes}.")


def _matches(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.match_substring_regex(column, HEX).to_numpy(), bool)


def _images(corpus: Corpus, table: pa.Table, where: str, deep: bool, found: _Found) -> None:
    """Offsets within shards, hashes of the bytes that stand there and, if wished, their pixels."""
    ids, content = table["id"].to_pylist(), table["content"].to_pylist()
    offset, length = table["offset"].to_numpy(), table["length"].to_numpy()
    impossible = (offset < 0) | (length < 1)
    found.rows(where, impossible, ids, lambda row: f"offset {offset[row]} and length {length[row]} cannot be.")
    changed, broken = np.zeros(len(ids), bool), {}
    missing = np.zeros(len(ids), bool)
    for shard in dict.fromkeys(table["shard"].to_pylist()):
        url = corpus.shard_url(shard)
        if not storage.exists(url):
            found.add(where, f"points to shard {shard}, which does not exist.")
            continue
        mine = np.flatnonzero(pc.equal(table["shard"], shard).to_numpy() & ~impossible)
        mine = mine[np.argsort(offset[mine], kind="stable")]
        ranges = read_ranges(url, offset[mine].tolist(), length[mine].tolist())
        for row, data in zip(mine.tolist(), ranges, strict=True):
            if data is None:
                missing[row] = True
                continue
            found.image_bytes += len(data)
            changed[row] = content_hash(data) != content[row]
            if deep:
                try:
                    decode(data)
                    found.decoded += 1
                except UndecodableError as error:
                    broken[row] = str(error)
    found.rows(where, missing, ids, lambda row: f"its shard ends before byte {offset[row] + length[row]}.")
    found.rows(where, changed, ids, lambda row: f"its bytes at {offset[row]} are not those that were ingested.")
    undecodable = np.isin(np.arange(len(ids)), list(broken))
    found.rows(where, undecodable, ids, lambda row: f"its image cannot be decoded: {broken[row]}.")


def _whole(corpus: Corpus, found: Sequence[_Found]) -> Iterator[Defect]:
    """What only all fragments together show."""
    ids = np.concatenate([each.ids for each in found])
    owner = np.repeat(np.arange(len(found)), [len(each.ids) for each in found])
    order = np.lexsort((owner, ids[:, 1], ids[:, 0]))
    same = order[1:][(np.diff(ids[order, 0]) == 0) & (np.diff(ids[order, 1]) == 0)]
    for row in same[:EXAMPLES].tolist():
        where = corpus.fragments[owner[row]].path
        yield Defect(where=where, defect=f"sample {id_text(ids[row : row + 1])[0]} is in the corpus more than once.")
    if len(same) > EXAMPLES:
        yield Defect(where="corpus.json", defect=f"{len(same) - EXAMPLES} more ids are there more than once.")
    if corpus.lanes is None:
        return
    lane = np.concatenate([each.lane for each in found])
    content = np.concatenate([each.content for each in found])
    if len(lane) != len(content):
        return  # a fragment without lanes has its own defect
    order = np.lexsort((lane, content[:, 1], content[:, 0]))
    equal = (np.diff(content[order, 0]) == 0) & (np.diff(content[order, 1]) == 0) & (np.diff(lane[order]) != 0)
    for row in order[1:][equal][:EXAMPLES].tolist():
        where = corpus.fragments[owner[row]].path
        yield Defect(
            where=where,
            defect=f"sample {id_text(ids[row : row + 1])[0]} has the content of another lane's sample: equal content "
            "must share a lane.",
        )
