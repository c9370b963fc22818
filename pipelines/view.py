"""A selection as a view: the curated corpus is a table whose rows point to the bytes where they are.

`write: {view: true}` writes one fragment for each fragment of the input, with its kept rows in their order, in the row
groups in which they were: a chunk is still a stretch of the original shard, now with gaps. Lanes stay those of the
input. What a view lacks is the shuffle over the whole corpus that copying gives; training shuffles windows of chunks in
either case. A view is good only as long as the shards that it points to are there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cl import storage
from cl.corpus import LANE_FIELD, Fragment, sample_schema
from cl.progress import progress
from pipelines.execute import fragments_through_ray, user_errors
from pipelines.plan import Plan
from pipelines.run_steps import FragmentView
from pipelines.write import kept_rows


def _path(number: int) -> str:
    return f"samples/{number:05d}.parquet"


def write_view_fragment(plan: Plan, number: int, columns: Sequence[str]) -> None:
    """Write the kept rows of one input fragment."""
    corpus, fragment = plan.corpus, plan.corpus.fragments[number]
    lanes = [LANE_FIELD.name] if fragment.lanes is not None else []
    table = kept_rows(plan, number, [*columns, *lanes])
    if corpus.kind == "image-text":
        shards = [corpus.shard_url(shard) for shard in table["shard"].to_pylist()]
    else:
        shards = [_path(number)] * table.num_rows
    table = table.set_column(table.schema.get_field_index("shard"), "shard", pa.array(shards, pa.string()))
    known = {field.name: field for field in [*sample_schema(corpus.kind), LANE_FIELD]}
    table = table.cast(pa.schema([known.get(field.name, field) for field in table.schema])).combine_chunks()
    positions = FragmentView(plan, number).alive(plan.nodes[-1].after)
    group = np.repeat(np.arange(len(fragment.row_groups)), fragment.row_groups)[positions]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    with (
        storage.atomic_write(storage.join(plan.out, _path(number))) as file,
        pq.ParquetWriter(file, table.schema, compression="zstd") as writer,
    ):
        for start, end in itertools.pairwise([*starts.tolist(), table.num_rows]):
            writer.write_table(table.slice(start, end - start), row_group_size=end - start)


class _WriteFragments:
    """Writes fragments of a view that are not there."""

    def __init__(self, plan: Plan, columns: Sequence[str]) -> None:
        self.plan, self.columns = plan, columns

    def __call__(self, number: int) -> None:
        if not storage.exists(storage.join(self.plan.out, _path(number))):
            write_view_fragment(self.plan, number, self.columns)


def write_view(plan: Plan, columns: Sequence[str]) -> list[Fragment]:
    """Write every fragment that is missing, one task each, and describe those that hold rows."""
    numbers = range(len(plan.corpus.fragments))
    missing = [number for number in numbers if not storage.exists(storage.join(plan.out, _path(number)))]
    if missing:
        with progress("Writing the view", total=len(missing), unit="fragments") as bar, user_errors():
            for _ in fragments_through_ray(missing, [((0, 1.0, 0.0), _WriteFragments, (plan, columns))]):
                bar.advance(1)
    described = [_describe(plan, number) for number in numbers]
    for each in described:
        if not each.samples:  # only now, as a file that is there is what a run that was killed need not write again
            fs, path = storage.open_fs(storage.join(plan.out, each.path))
            fs.rm(path)
    return [each for each in described if each.samples]


def _describe(plan: Plan, number: int) -> Fragment:
    """The manifest entry of a written fragment, from its table."""
    fragment, path = plan.corpus.fragments[number], _path(number)
    with storage.open_parquet(storage.join(plan.out, path)) as file:
        groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        lanes = None
        if fragment.lanes is not None:
            lane = file.read(columns=[LANE_FIELD.name])[LANE_FIELD.name].to_numpy()
            lanes = [int(value) for value in lane[np.cumsum([0, *groups[:-1]])]] if groups else []
    shard = plan.corpus.shard_url(fragment.shard) if plan.corpus.kind == "image-text" else path
    return Fragment(path=path, samples=sum(groups), shard=shard, row_groups=groups, lanes=lanes)
