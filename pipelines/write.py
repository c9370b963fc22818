"""Write a curated corpus: globally shuffled within lanes, in shards of a target size, byte for byte the same each time.

Three steps: a keyed node says where each sample goes (`pipelines/placement.py`), every input fragment is split by
output shard (`scatter`), and every output shard is written by one task (`write_shard`): the tar first, its table last.
Chunks are the row groups of the light plane and, as contiguous members of a shard, what training reads at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from cl import storage
from cl.corpus import LANE_FIELD, Fragment, Kind, content_hash, sample_schema
from cl.errors import ConfigError, DataError
from cl.progress import progress
from pipelines.execute import fragments_through_ray, user_errors
from pipelines.heavy import read_rows
from pipelines.placement import PLACED, Placement, WriteConfig, contents
from pipelines.plan import Plan, Step
from pipelines.run_steps import FragmentView
from pipelines.shuffle import Routed, read_routed, write_routed
from pipelines.stages.base import text_fields

BLOCK = 512  # bytes: tar headers and padding
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif"}


def carried(plan: Plan, settings: WriteConfig) -> list[str]:
    """The columns beyond the format's own that go into the curated corpus.

    Raises:
        ConfigError: a column that is asked for is not there, or holds vectors or bytes.
    """
    own = {*sample_schema(plan.corpus.kind).names, LANE_FIELD.name}
    texts = replaceable(plan.corpus.kind)
    for name, column in settings.replace.items():
        if name not in texts:
            raise ConfigError(f"write.replace: {name!r} is no text of this corpus; its texts are {', '.join(texts)}.")
        node = plan.columns.get(column)
        wanted = sample_schema(plan.corpus.kind).field(name).type
        if node is None or next(m.type for m in plan.made(node) if m.name == column) != wanted:
            what = "texts" if pa.types.is_list(wanted) else "a text"
            raise ConfigError(f"write.replace: no stage writes {what} {column!r} to put in the place of {name!r}.")
    extra = {name: plan.base.field(name) for name in plan.base.names if name not in own}
    for name, node in plan.columns.items():
        if node is not None:
            extra[name] = next(made for made in plan.made(node) if made.name == name)
    if settings.columns is None:
        return [
            name
            for name, made in extra.items()
            if plain(made.type) and not (made.metadata and b"internal" in made.metadata)
        ]
    for name in settings.columns:
        if name in own:
            raise ConfigError(f"write.columns: {name!r} is in every corpus and need not be listed.")
        if name not in extra:
            raise ConfigError(f"write.columns: no stage writes {name!r}; there are {', '.join(extra) or 'none'}.")
        kind = extra[name].type
        if not plain(kind.value_type if pa.types.is_list(kind) else kind):
            raise ConfigError(f"write.columns: {name!r} holds {kind}; only numbers, text or lists of them are carried.")
    return list(settings.columns)


def replaceable(kind: Kind) -> list[str]:
    """What `write.replace` may name."""
    return [*text_fields(kind), *(["negatives"] if kind == "text-text" else [])]


def plain(kind: pa.DataType) -> bool:
    """Whether a column holds one number or text a row."""
    simple = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return bool(simple or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def scatter_file(plan: Plan, number: int) -> str:
    return storage.join(plan.folder(plan.nodes[-1].number, "scatter"), f"{number:05d}.arrow")


def kept_rows(plan: Plan, number: int, columns: Sequence[str]) -> pa.Table:
    """A fragment's kept rows with the columns of every corpus and others, texts replaced where the config says so."""
    node = plan.nodes[-1]
    view = FragmentView(plan, number)
    wanted = [*sample_schema(plan.corpus.kind).names, *columns]
    view.preload([name for name in wanted if plan.columns[name] is None])
    positions = view.alive(node.after)
    assert isinstance(node.stage, Placement)
    settings = node.stage.settings
    texts = {name: settings.replace.get(name, name) for name in replaceable(plan.corpus.kind)}
    names = [texts.get(name, name) for name in wanted]
    found = {name: view.column(name, plan.columns[name], positions) for name in names}
    table = pa.table({name: found[texts.get(name, name)] for name in wanted})
    content = contents(pa.table(found), plan.corpus.kind, settings)
    return table.set_column(table.schema.get_field_index("content"), "content", pa.array(content, pa.string()))


def scatter(plan: Plan, number: int, columns: Sequence[str]) -> None:
    """Send a fragment's kept rows to their output shards."""
    node, view = plan.nodes[-1], FragmentView(plan, number)
    table = kept_rows(plan, number, columns)
    for name in PLACED.names:
        table = table.append_column(name, view.made(node.number, name))
    write_routed(scatter_file(plan, number), Routed(table, table["out_shard"].to_numpy()))


def _gather(plan: Plan, shard: int) -> pa.Table:
    """The rows of one output shard, in their final order."""
    files = [scatter_file(plan, number) for number in range(len(plan.corpus.fragments))]
    return read_routed(files, shard).sort_by("place")


def shard_samples(plan: Plan, shard: int) -> str:
    return storage.join(plan.out, "samples", f"{shard:05d}.parquet")


def write_shard(plan: Plan, shard: int, columns: Sequence[str]) -> None:
    """Write one output shard: the tar (if there are images), then its table, which marks the shard as done.

    Raises:
        DataError: an image is not the one that was ingested; the disk is full.
    """
    rows = _gather(plan, shard)
    kind = plan.corpus.kind
    chunk, lane = rows["chunk"].to_numpy(), rows["out_lane"].to_numpy()
    table = rows.select([*sample_schema(kind).names, *columns])
    path = f"samples/{shard:05d}.parquet"
    if kind == "image-text":
        path = f"shards/{shard:05d}.tar"
        images = _read_images(plan, table)
        with storage.atomic_write(storage.join(plan.out, path)) as file:
            offsets = _write_tar(file, table, images, columns)
        table = table.set_column(table.schema.get_field_index("offset"), "offset", pa.array(offsets, pa.int64()))
    column = table.schema.get_field_index("shard")
    table = table.set_column(column, "shard", pa.array([path] * table.num_rows, pa.string()))
    table = table.append_column(LANE_FIELD, pa.array(lane, pa.int32()))
    fields = [
        sample_schema(kind).field(each.name) if each.name in sample_schema(kind).names else each
        for each in table.schema
    ]
    table = table.cast(pa.schema(fields)).combine_chunks()
    starts = np.flatnonzero((np.diff(chunk, prepend=-1) != 0) | (np.diff(lane, prepend=-1) != 0))
    with (
        storage.atomic_write(shard_samples(plan, shard)) as file,
        pq.ParquetWriter(file, table.schema, compression="zstd") as writer,
    ):
        for start, end in zip(starts, [*starts[1:], table.num_rows], strict=True):
            writer.write_table(table.slice(start, end - start), row_group_size=end - start)


def _read_images(plan: Plan, table: pa.Table) -> list[bytes]:
    """The encoded images of rows, read in the order in which they lie, returned in the order of the rows."""
    located = pa.table({"shard": table["shard"], "offset": table["offset"], "row": np.arange(table.num_rows)})
    order = located.sort_by([("shard", "ascending"), ("offset", "ascending")])["row"].to_numpy()
    content, ids = table["content"].to_pylist(), table["id"].to_pylist()
    images: list[bytes] = [b""] * table.num_rows
    for row, data in zip(order.tolist(), read_rows(plan.corpus, table.take(pa.array(order))), strict=True):
        if data is None or content_hash(data) != content[row]:
            where = table["shard"][row].as_py()
            raise DataError(f"Sample {ids[row]} in shard {where} has changed since it was ingested: ingest it again.")
        images[row] = data
    return images


def _write_tar(file: Any, table: pa.Table, images: Sequence[bytes], columns: Sequence[str]) -> list[int]:
    """Write a webdataset tar; returns the offset of each image's bytes. Members are named by the sample's id."""
    offsets, position = [], 0
    for row, data in zip(table.drop_columns(["offset", "shard"]).to_pylist(), images, strict=True):
        offsets.append(position + BLOCK)
        position += write_sample(file, row, data, _sidecar(row, columns))
    file.write(bytes(2 * BLOCK))
    return offsets


def write_sample(file: IO[bytes], row: dict[str, Any], image: bytes, sidecar: dict[str, Any]) -> int:
    """Write a sample's members (image first) to a tar and return how many bytes that took.

    Args:
        row: `id`, `format` and `text`.
    """
    members = [
        (EXTENSIONS[row["format"]], image),
        ("json", orjson.dumps(sidecar)),
        ("txt", row["text"].encode()),
    ]
    size = 0
    for suffix, content in members:
        padding = -len(content) % BLOCK
        file.write(tar_header(f"{row['id']}.{suffix}", len(content)))
        file.write(content)
        file.write(bytes(padding))
        size += BLOCK + len(content) + padding
    return size


def _sidecar(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """What stands in a sample's JSON member."""
    meta = row["meta"]
    if meta is not None:
        with contextlib.suppress(orjson.JSONDecodeError):  # not JSON: kept as the text it is
            meta = orjson.loads(meta)
    names = ["id", "source", "key", "content", "width", "height", *columns]
    return {name: row[name] for name in names} | {"meta": meta}


def tar_header(name: str, size: int) -> bytes:
    """The ustar header of a regular file: mode 0644, owner and time 0, so that equal content is equal bytes."""
    fields = [
        name.encode().ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,
        f"{size:011o}\0".encode(),
        b"00000000000\0",  # time
        b" " * 8,  # checksum, as the sum is taken
        b"0",
        bytes(100),
        b"ustar\00000",
        bytes(64),
        b"0000000\0" * 2,
        bytes(167),
    ]
    header = b"".join(fields)
    return header[:148] + f"{sum(header):06o}\0 ".encode() + header[156:]


def describe_shard(plan: Plan, shard: int) -> Fragment:
    """The manifest entry of a written shard, from its table."""
    with storage.open_parquet(shard_samples(plan, shard)) as file:
        groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        lanes = [lane for lane, _ in extremes(file, "lane")]
    path = f"samples/{shard:05d}.parquet"
    owner = f"shards/{shard:05d}.tar" if plan.corpus.kind == "image-text" else path
    return Fragment(path=path, samples=sum(groups), shard=owner, row_groups=groups, lanes=lanes)


def extremes(file: pq.ParquetFile, column: str) -> list[tuple[int, int]]:
    """The least and the largest value of a column in each row group that has rows, from the footer."""
    place = file.schema.names.index(column)
    groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    found = [group.column(place).statistics for group in groups if group.num_rows]
    return [(each.min, each.max) for each in found]


class _WriteShards:
    """Writes output shards that are not there."""

    def __init__(self, plan: Plan, columns: Sequence[str]) -> None:
        self.plan, self.columns = plan, columns

    def __call__(self, number: int) -> None:
        if not storage.exists(shard_samples(self.plan, number)):
            write_shard(self.plan, number, self.columns)


def write_shards(plan: Plan, columns: Sequence[str]) -> list[Fragment]:
    """Write every output shard that is missing, one task each, and describe all of them."""
    fragments = range(len(plan.corpus.fragments))
    step = Step(plan.nodes[-1].number, "apply")
    count = 0
    for number in fragments:
        with storage.open_parquet(plan.file(step, number)) as file:
            count = max([count, *(last + 1 for _, last in extremes(file, "out_shard"))])
    missing = [number for number in range(count) if not storage.exists(shard_samples(plan, number))]
    if missing:
        with progress("Writing shards", total=len(missing), unit="shards") as bar, user_errors():
            for _ in fragments_through_ray(missing, [((0, 1.0, 0.0), _WriteShards, (plan, columns))]):
                bar.advance(1)
    return [describe_shard(plan, number) for number in range(count)]
