"""`clew remove`: take samples out of corpora for good.

    results = remove(["runs/corpus", "runs/curated"], "ids.txt")

Only fragments that hold such a sample are rewritten, and the shards of theirs that belong to the corpus; a tar that it
merely points to stays as it is, and is named. The ids become tombstones, which ingest and curate honour whatever they
are asked to do again. Texts of removed samples also leave the lists of mined texts and the annotated rows, and what
a curation remembers in `.nodes` is deleted.

Rewritten files have new names, and the manifest is the one commit: before it the old files are whole, after it the new
ones. While `removing.json` is there every reader refuses the corpus. Killed at any moment, the same command does the
rest and ends with the same bytes; done again it changes nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from blake3 import blake3
from pydantic import BaseModel

from cl import storage
from cl.corpus import QUARANTINE_SCHEMA, Corpus, Fragment, open_corpus
from cl.errors import ConfigError, DataError
from cl.tombstones import PENDING, read_tombstones, tombstones_digest, write_tombstones
from pipelines.readers.blocks import BlockReader
from pipelines.shards import RECORDS
from pipelines.tar import BLOCK, Member, scan, split_name

ID = re.compile(r"[0-9a-f]{32}")
OURS = re.compile(r"\d{5,}(\.[0-9a-f]{16})?\.(parquet|tar)")  # names of fragments and shards that Clew writes
KEPT_OF_REMOVED = ("id", "source", "drop_stage", "drop_reason", "quarantined")  # of an annotated row


class RemoveResult(BaseModel):
    """What was removed from one corpus."""

    corpus: str
    removed: int  # samples, by this call
    unknown: int  # ids of the file that the corpus did not hold; they are kept out from now on
    tombstones: int  # ids in all
    fragments: int  # rewritten
    shards: int  # rewritten
    left_in: list[str]  # shards that the corpus only points to and that still hold removed bytes


def read_ids(path: str) -> list[str]:
    """The ids of a text file, one a line; empty lines and those that start with # do not count.

    Raises:
        ConfigError: there is no such file, no id in it, or a line that is none.
    """
    fs, place = storage.open_fs(path)
    try:
        lines = bytes(fs.cat_file(place)).decode("utf-8", "replace").splitlines()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"The file of ids {path} does not exist.") from error
    found = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip() and line[0] != "#"}
    for number, name in found.items():
        if not ID.fullmatch(name):
            raise ConfigError(f"{path}, line {number}: {name!r:.60} is no id of 32 hex digits.")
    if not found:
        raise ConfigError(f"The file of ids {path} has no id in it.")
    return sorted(set(found.values()))


def remove(roots: Sequence[str], ids_file: str) -> list[RemoveResult]:
    """Remove the samples that a file names from each corpus.

    Raises:
        ConfigError: the file cannot be used.
        DataError: a corpus cannot be used, or shares a shard of its own between fragments.
    """
    ids = read_ids(ids_file)
    corpora = [open_corpus(root, unfinished_removal=True) for root in roots]
    for corpus in corpora:
        _check_shards(corpus)
    return [_remove(corpus, ids) for corpus in corpora]


def _owned(corpus: Corpus, fragment: Fragment) -> bool:
    """Whether a fragment's images are in a shard that belongs to the corpus."""
    return corpus.kind == "image-text" and "://" not in fragment.shard and not fragment.shard.startswith("/")


def _check_shards(corpus: Corpus) -> None:
    shards = Counter(fragment.shard for fragment in corpus.fragments if _owned(corpus, fragment))
    for shard, count in shards.items():
        if count > 1 or not shard.endswith(".tar"):
            raise DataError(
                f"{corpus.root}: {shard} is no tar of one fragment alone, so no sample can be taken out of it."
            )


def _remove(corpus: Corpus, ids: list[str]) -> RemoveResult:
    root = corpus.root
    tombstones = sorted({*read_tombstones(root), *ids})
    storage.write_json(storage.join(root, PENDING), {"tombstones": len(tombstones)})
    write_tombstones(root, tombstones)
    gone = pa.array(tombstones, pa.string())
    texts = _texts(corpus, gone)
    changed: dict[str, Fragment | None] = {}
    left: set[str] = set()
    known: set[str] = set()
    for fragment in corpus.fragments:
        url = corpus.fragment_url(fragment)
        hit = pc.is_in(storage.read_table(url, ["id"])["id"], gone)
        if not pc.any(hit).as_py() and not _names_a_text(url, texts):
            continue
        table = storage.read_table(url)
        lost = table.filter(hit)
        known |= set(lost["id"].to_pylist())
        if corpus.kind == "image-text" and not _owned(corpus, fragment):
            left |= set(lost["shard"].to_pylist())
        changed[fragment.path] = _rewrite(corpus, fragment, table, hit, texts)
        _record(root, fragment, changed[fragment.path], lost)
    _annotated(root, gone)
    fragments = [new for each in corpus.fragments if (new := changed.get(each.path, each)) is not None]
    after = corpus.model_copy(
        update={"fragments": fragments, "samples": sum(each.samples for each in fragments),
                "quarantined": _quarantined(corpus)}
    )  # fmt: skip
    _forget(after)
    if after != corpus:
        after.write(root)
    _sweep(after)
    fs, path = storage.open_fs(storage.join(root, PENDING))
    fs.rm(path)
    return RemoveResult(
        corpus=root,
        removed=len(known),
        unknown=len(set(ids) - known),
        tombstones=len(tombstones),
        fragments=len(changed),
        shards=sum(_owned(corpus, each) for each in corpus.fragments if each.path in changed),
        left_in=sorted(left),
    )


def _texts(corpus: Corpus, gone: pa.Array) -> pa.Array:
    """The documents of the samples to remove: mined negatives of others are verbatim copies of them."""
    column = "positive" if corpus.kind == "text-text" else "text"
    found: set[str] = set()
    for fragment in corpus.fragments:
        table = storage.read_table(corpus.fragment_url(fragment), ["id", column])
        found |= set(table.filter(pc.is_in(table["id"], gone))[column].to_pylist())
    return pa.array(sorted(found), pa.string())


def _lists(schema: pa.Schema) -> list[str]:
    """Columns of lists of texts."""
    return [
        field.name for field in schema if pa.types.is_list(field.type) and pa.types.is_string(field.type.value_type)
    ]


def _names_a_text(url: str, texts: pa.Array) -> bool:
    """Whether a text is in a list of a fragment's rows."""
    if not len(texts):
        return False
    with storage.open_parquet(url) as file:
        names = _lists(file.schema_arrow)
        table = file.read(columns=names)
    return any(pc.any(pc.is_in(pc.list_flatten(table[name].combine_chunks()), texts)).as_py() for name in names)


def _rewrite(
    corpus: Corpus, fragment: Fragment, table: pa.Table, hit: pa.ChunkedArray, texts: pa.Array
) -> Fragment | None:
    """Write a fragment, and the shard that is its own, without some rows; None if nothing is left."""
    gone = hit.to_numpy()
    group = np.repeat(np.arange(len(fragment.row_groups)), fragment.row_groups)[~gone]
    if not len(group):
        return None
    names = "\0".join([fragment.path, *table.filter(hit)["id"].to_pylist(), *texts.to_pylist()])
    version = blake3(names.encode()).hexdigest(length=8)
    path = f"samples/{_stem(fragment.path)}.{version}.parquet"
    shard = fragment.shard
    kept = table.filter(pc.invert(hit))
    if _owned(corpus, fragment):
        shard = f"shards/{_stem(fragment.shard)}.{version}.tar"
        moved = _copy_tar(corpus, fragment.shard, shard, set(table.filter(hit)["offset"].to_pylist()))
        offsets = pa.array([moved[offset] for offset in kept["offset"].to_pylist()], pa.int64())
        kept = _put(kept, "offset", offsets)
    elif shard == fragment.path:
        shard = path
    if shard != fragment.shard:
        kept = _put(kept, "shard", pa.array([shard] * len(group), pa.string()))
    if len(texts):
        kept = _without(kept, texts)
    groups, counts = np.unique(group, return_counts=True)
    starts = np.cumsum(counts) - counts
    with (
        storage.atomic_write(storage.join(corpus.root, path)) as file,
        pq.ParquetWriter(file, kept.schema, compression="zstd") as writer,
    ):
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
            writer.write_table(kept.slice(start, count), row_group_size=count)
    lanes = None if fragment.lanes is None else [fragment.lanes[each] for each in groups.tolist()]
    return Fragment(path=path, samples=len(group), shard=shard, row_groups=counts.tolist(), lanes=lanes)


def _stem(path: str) -> str:
    """A file's name without its version and suffix."""
    return path.rpartition("/")[2].partition(".")[0]


def _put(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), values)


def _without(table: pa.Table, texts: pa.Array) -> pa.Table:
    """The rows without some texts in their lists, and without what stands beside those in the lists that go with them.

    With `negatives` go the columns `mined_...`, with `X_texts` the columns `X_...`, as the stage `mine` writes them.
    """
    named = set(texts.to_pylist())
    for name in _lists(table.schema):
        found = table[name].to_pylist()
        stay = [None if each is None else [text not in named for text in each] for each in found]
        if all(mask is None or all(mask) for mask in stay):
            continue
        prefix = "mined_" if name == "negatives" else name.removesuffix("texts") if name.endswith("_texts") else name
        for other in table.column_names:
            kind = table.schema.field(other).type
            if pa.types.is_list(kind) and (other == name or other.startswith(prefix)):
                values = [_where(each, mask) for each, mask in zip(table[other].to_pylist(), stay, strict=True)]
                table = _put(table, other, pa.array(values, kind))
    return table


def _where(values: list[Any] | None, mask: list[bool] | None) -> list[Any] | None:
    """The values that stay; all of them if the lists do not go together."""
    if values is None or mask is None or len(values) != len(mask):
        return values
    return [value for value, stays in zip(values, mask, strict=True) if stays]


def _copy_tar(corpus: Corpus, old: str, new: str, gone: set[int]) -> dict[int, int]:
    """Copy a tar without the samples whose images stand at some offsets; returns old -> new offset of all others."""
    moved: dict[int, int] = {}
    with BlockReader(corpus.shard_url(old)) as reader, storage.atomic_write(corpus.shard_url(new)) as file:
        members = [member for member in scan(reader) if isinstance(member, Member)]
        keys = {split_name(member.name)[0] for member in members if member.offset in gone}
        before, position = 0, 0
        for member in members:
            end = member.offset + -(-member.size // BLOCK) * BLOCK
            if split_name(member.name)[0] not in keys:
                moved[member.offset] = position + member.offset - before  # extended headers stand before the header
                file.write(reader.read_at(before, end - before))
                position += end - before
            before = end
        file.write(bytes(2 * BLOCK))
    return moved


def _record(root: str, fragment: Fragment, new: Fragment | None, lost: pa.Table) -> None:
    """Tell the records of ingest, so that it takes the rewritten fragment for its own."""
    folder = storage.join(root, RECORDS)
    place = storage.join(folder, f"{_stem(fragment.path)}.json")
    if not storage.exists(place) or not lost.num_rows:
        return
    record: dict[str, Any] = storage.read_json(place)
    path = storage.join(root, f"quarantine/{record['number']:05d}.parquet")
    table = storage.read_table(path) if storage.exists(path) else QUARANTINE_SCHEMA.empty_table()
    again = pc.and_(pc.equal(table["reason"], "removed"), pc.is_in(table["key"], lost["key"].combine_chunks()))
    added = [
        {"shard": row["shard"], "key": row["key"], "stage": "ingest", "reason": "removed", "detail": None}
        for row in lost.select(["shard", "key"]).to_pylist()
    ]
    table = pa.concat_tables([table.filter(pc.invert(again)), pa.Table.from_pylist(added, QUARANTINE_SCHEMA)])
    storage.write_table(path, table)
    record |= {
        "samples": new.samples if new else 0,
        "row_groups": new.row_groups if new else [],
        "samples_path": new.path if new else None,
        "shard": new.shard if new else record["shard"],
        "quarantined": table.num_rows,
        "reasons": dict(sorted(Counter(table["reason"].to_pylist()).items())),
    }
    storage.write_json(place, record)


def _quarantined(corpus: Corpus) -> int:
    """Rows of the quarantine of ingest, of which there may just have come more."""
    if not storage.list_files(storage.join(corpus.root, RECORDS)):
        return corpus.quarantined
    folder = storage.join(corpus.root, "quarantine")
    rows = 0
    for name in storage.list_files(folder, ".parquet"):
        with storage.open_parquet(storage.join(folder, name)) as file:
            rows += file.metadata.num_rows
    return rows


def _annotated(root: str, gone: pa.Array) -> None:
    """Leave of the removed samples' annotated rows no more than what happened to them, and count them in the funnel."""
    folder = storage.join(root, "annotated")
    removed = kept = 0
    for name in storage.list_files(folder, ".parquet"):
        url = storage.join(folder, name)
        table = storage.read_table(url)
        hit = pc.is_in(table["id"], gone)
        was_kept = pc.and_(hit, pc.is_null(table["drop_stage"]))
        blanked = {}
        for field in table.schema:
            column = table[field.name]
            if field.name == "drop_stage":
                column = pc.if_else(was_kept, "remove", column)
            elif field.name == "drop_reason":
                column = pc.if_else(was_kept, "removed", column)
            elif field.name not in KEPT_OF_REMOVED:
                empty = "" if pa.types.is_string(field.type) else None
                column = pc.if_else(hit, pa.scalar(empty, field.type), column)
            blanked[field.name] = column
        after = pa.table(blanked)
        if not after.equals(table.replace_schema_metadata(None)):
            storage.write_table(url, after)
        removed += pc.sum(pc.equal(after["drop_stage"], "remove")).as_py() or 0
        kept += after["drop_stage"].null_count
    path = storage.join(root, "funnel.json")
    if removed and storage.exists(path):
        funnel = storage.read_json(path)
        stages = [stage for stage in funnel["stages"] if stage["stage"] != "remove"]
        entry = {"stage": "remove", "in": kept + removed, "dropped": {"removed": removed}, "quarantined": 0}
        funnel["stages"] = [*stages, entry | {"seconds": 0.0, "rows_per_second": 0.0}]
        funnel |= {"kept": kept, "dropped": funnel["in"] - funnel["quarantined"] - kept}
        storage.write_bytes(path, orjson.dumps(funnel, option=orjson.OPT_INDENT_2) + b"\n")


def _forget(corpus: Corpus) -> None:
    """Delete what a curation remembers of its samples, and let it know that it is finished all the same."""
    fs, folder = storage.open_fs(storage.join(corpus.root, ".nodes"))
    if not fs.exists(folder):
        return
    marker = storage.join(corpus.root, ".nodes", "current.json")
    if storage.exists(marker):
        state = storage.read_json(marker)
        key = state["key"].partition(":")[0]
        state["key"] = f"{key}:{tombstones_digest(corpus.root)}"
        funnel = storage.join(corpus.root, "funnel.json")
        if "result" in state and storage.exists(funnel):
            stages = storage.read_json(funnel)["stages"]
            state["result"] |= {
                "kept": corpus.samples,
                "dropped": {f"{s['stage']}/{why}": n for s in stages for why, n in s["dropped"].items()},
                "shards": len(corpus.fragments),
            }
        storage.write_json(marker, state)
    for entry in fs.ls(folder, detail=True):
        if entry["type"] == "directory":
            fs.rm(entry["name"], recursive=True)


def _sweep(corpus: Corpus) -> None:
    """Delete fragments and shards that the manifest does not name, and what killed removals left."""
    for folder in ("", "samples", "shards", "quarantine", "annotated", RECORDS, ".nodes"):
        storage.sweep_temporary(storage.join(corpus.root, folder))
    wanted = {each.path for each in corpus.fragments} | {each.shard for each in corpus.fragments}
    for folder in ("samples", "shards"):
        for name in storage.list_files(storage.join(corpus.root, folder)):
            if OURS.fullmatch(name) and f"{folder}/{name}" not in wanted:
                fs, path = storage.open_fs(storage.join(corpus.root, folder, name))
                fs.rm(path)
