"""What one worker does with one fragment: run steps of a plan, each into its own file.

Every function here can be repeated at any time by any worker and writes the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cl import storage
from cl.errors import DataError
from pipelines.heavy import MISSING_BYTES, UndecodableError, decode
from pipelines.plan import Node, Plan, Step, is_pixel
from pipelines.stages.base import GlobalStage, Output, PixelStage, Rows, RowStage
from pipelines.stages.keyed import KeyedStage
from pipelines.streams import read_result, write_streams

SECONDS = b"clew.seconds"  # in a node file's metadata: how long the stage took on the fragment


class FragmentView:
    """The columns of one fragment as the plan's nodes see them; reads each at most once."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan = plan
        self.number = number
        self.fragment = plan.corpus.fragments[number]
        self._base: dict[str, pa.ChunkedArray] = {}
        self._made: dict[tuple[int, str], pa.ChunkedArray] = {}
        self._alive: dict[int | None, np.ndarray] = {}

    def preload(self, columns: Sequence[str]) -> None:
        """Read columns of the corpus in one go.

        Raises:
            DataError: a column is missing in this fragment, or its number of rows is not the manifest's.
        """
        wanted = [column for column in dict.fromkeys(columns) if column not in self._base]
        if not wanted:
            return
        url = self.plan.corpus.fragment_url(self.fragment)
        table = storage.read_table(url, wanted)
        if table.num_rows != self.fragment.samples:
            raise DataError(f"{url} has {table.num_rows} rows, but the corpus's manifest says {self.fragment.samples}.")
        for column in wanted:
            self._base[column] = table[column]

    def base(self, column: str) -> pa.ChunkedArray:
        """A column of the corpus, all rows."""
        self.preload([column])
        return self._base[column]

    def made(self, node: int, column: str) -> pa.ChunkedArray:
        """A column of a node's file: the rows that were alive when it ran."""
        if (node, column) not in self._made:
            self._made[node, column] = self._read(node, [column])[column]
        return self._made[node, column]

    def _read(self, node: int, columns: list[str]) -> pa.Table:
        return storage.read_table(self.plan.file(Step(node, "run"), self.number), columns)

    def remember(self, node: int, table: pa.Table) -> None:
        """Keep what a node has just written, for later nodes of the same pass."""
        for column in table.column_names:
            self._made[node, column] = table[column]

    def seen(self, node: int) -> np.ndarray:
        """int32: positions of the rows that were alive when a node ran."""
        return np.asarray(self.made(node, "row").to_numpy(), np.int32)

    def alive(self, after: int | None) -> np.ndarray:
        """int32: positions of the rows that are alive after a node that may drop (None: all)."""
        if after not in self._alive:
            if after is None:
                self._alive[after] = np.arange(self.fragment.samples, dtype=np.int32)
            else:
                good = pc.and_(pc.is_null(self.made(after, "drop")), pc.is_null(self.made(after, "broken")))
                self._alive[after] = self.seen(after)[good.to_numpy()]
        return self._alive[after]

    def column(self, column: str, source: int | None, positions: np.ndarray) -> pa.ChunkedArray:
        """A column at positions of the fragment, all of which its writer has seen."""
        if source is None:
            values, seen = self.base(column), None
        else:
            values, seen = self.made(source, column), self.seen(source)
        if len(values) == len(positions):  # positions are ascending and within what was seen
            return values
        return values.take(pa.array(positions if seen is None else np.searchsorted(seen, positions)))

    def rows(self, node: Node, extra: Sequence[str] = ()) -> Rows:
        """The living rows with the columns that a node needs."""
        positions = self.alive(node.after)
        sources: dict[str, int | None] = dict.fromkeys(["id", *extra])
        sources |= node.sources
        columns = {name: self.column(name, source, positions) for name, source in sources.items()}
        return Rows(
            pa.table(columns), positions, self.number, self.plan.corpus, self.plan.seed, beside=self.plan.beside()
        )


class StandingView(FragmentView):
    """The kept rows of a fragment of a finished curation, as a plan that judges new rows beside them sees them."""

    def __init__(self, plan: Plan, number: int) -> None:
        super().__init__(*plan.home(number))
        self.viewer, self.joined = plan, number

    def alive(self, after: int | None) -> np.ndarray:
        return super().alive(self.plan.last_drop())

    def column(self, column: str, source: int | None, positions: np.ndarray) -> pa.ChunkedArray:
        return super().column(column, self.plan.columns[column], positions)

    def rows(self, node: Node, extra: Sequence[str] = ()) -> Rows:
        found = super().rows(node, extra)
        return replace(
            found, fragment=self.joined, standing=True, beside=self.viewer.beside(), corpus=self.viewer.corpus
        )


def view_of(plan: Plan, number: int) -> FragmentView:
    """The view of a fragment of the corpus, or of a finished curation."""
    return FragmentView(plan, number) if number < len(plan.corpus.fragments) else StandingView(plan, number)


class NodeColumns:
    """`Columns` of a reduction: the rows that the node's partials saw."""

    def __init__(self, plan: Plan, node: int) -> None:
        self.plan, self.node = plan, plan.nodes[node]

    def read(self, fragment: int, column: str) -> pa.ChunkedArray:
        view = view_of(self.plan, fragment)
        source = self.plan.columns[column] if column not in self.node.sources else self.node.sources[column]
        return view.column(column, source, view.alive(self.node.after))


IMAGE_COLUMNS = ("shard", "offset", "length")


def base_columns(plan: Plan, steps: Sequence[Step]) -> list[str]:
    """The columns of the corpus that steps read."""
    columns = ["id"]
    for step in steps:
        node = plan.nodes[step.node]
        columns += [column for column, source in node.sources.items() if source is None]
        if is_pixel(plan, step):
            columns += IMAGE_COLUMNS
    return list(dict.fromkeys(columns))


def run_steps(plan: Plan, steps: Sequence[Step], number: int, opened: dict[int, Callable[[Rows], Output]]) -> None:
    """Do those steps on a fragment whose files are not there yet.

    Args:
        opened: node -> what its `open` returned, filled in here and kept by the caller for its next fragment.
    """
    missing = [step for step in steps if not storage.exists(plan.file(step, number))]
    if not missing:
        return
    view = view_of(plan, number)
    view.preload(base_columns(plan, missing))
    measured: dict[int, dict[int, Any]] | None = None
    decode_seconds = 0.0
    for step in missing:
        node = plan.nodes[step.node]
        stage = node.stage
        start = time.perf_counter()
        if step.action == "partial":
            table = _partial(plan, node, view.rows(node), number)
            _write(plan, step, number, table, time.perf_counter() - start)
            continue
        rows = view.rows(node, IMAGE_COLUMNS if is_pixel(plan, step) else ())
        share = 0.0
        if isinstance(stage, PixelStage):
            if measured is None:
                pixel = [each.node for each in missing if is_pixel(plan, each)]
                measured = _measure(plan, pixel, rows)
                decode_seconds = (time.perf_counter() - start) / len(pixel)
                start = time.perf_counter()
            share = decode_seconds
            output = _finish(stage, rows, measured[node.number], measured[-1])
        elif isinstance(stage, (GlobalStage, KeyedStage)):
            output = stage.apply(rows, read_reduced(plan, node.number, number))
        else:
            assert isinstance(stage, RowStage)
            if node.number not in opened:
                opened[node.number] = stage.open()
            output = opened[node.number](rows)
        table = output_table(node, plan.made(node.number), rows, output)
        _write(plan, step, number, table, time.perf_counter() - start + share)
        view.remember(node.number, table)


def _partial(plan: Plan, node: Node, rows: Rows, number: int) -> pa.Table:
    """A global stage's partial; a keyed stage's goes into its streams, and what is left here counts their rows."""
    stage = node.stage
    if isinstance(stage, KeyedStage):
        streams = stage.partial(rows, plan.partitions)
        write_streams(plan, node.number, streams, stage.sends, (0, number))
        return pa.table({name: [len(routed.to)] for name, routed in streams.items()})
    assert isinstance(stage, GlobalStage)
    return stage.partial(rows)


def _write(plan: Plan, step: Step, number: int, table: pa.Table, seconds: float) -> None:
    marked = table.replace_schema_metadata({SECONDS: f"{seconds:.6f}".encode()})
    storage.write_table(plan.file(step, number), marked)


def _measure(plan: Plan, nodes: Sequence[int], rows: Rows) -> dict[int, dict[int, Any]]:
    """Decode each image once; node -> position -> measure, and -1 -> position -> why it cannot be decoded."""
    found: dict[int, dict[int, Any]] = {node: {} for node in nodes}
    broken: dict[int, Any] = {}
    stages = [(node, plan.nodes[node].stage) for node in nodes]
    for position, data in zip(rows.positions.tolist(), rows.images(), strict=True):
        if data is None:
            broken[position] = MISSING_BYTES
            continue
        try:
            pixels = decode(data)
        except UndecodableError as error:
            broken[position] = str(error)
            continue
        for node, stage in stages:
            assert isinstance(stage, PixelStage)
            found[node][position] = stage.measure(pixels)
    return {**found, -1: broken}


def _finish(stage: PixelStage, rows: Rows, measured: dict[int, Any], broken: dict[int, Any]) -> Output:
    """The stage's output on the rows that could be decoded, spread over all rows."""
    positions = rows.positions.tolist()
    good = np.array([position not in broken for position in positions], bool)
    part = Rows(rows.table.filter(pa.array(good)), rows.positions[good], rows.fragment, rows.corpus, rows.seed)
    output = stage.finish(part, [measured[position] for position in part.positions.tolist()])
    spread = np.cumsum(good) - 1
    index = pa.array(np.where(good, spread, 0), pa.int64(), mask=~good)
    columns = {
        name: _array(values).take(index) if len(part) else pa.nulls(len(rows), _array(values).type)
        for name, values in output.columns.items()
    }
    drop = None
    if output.drop is not None:
        drop = np.full(len(rows), None, dtype=object)
        drop[good] = np.asarray(output.drop, dtype=object)
    bad = {row: str(broken[position]) for row, position in enumerate(positions) if position in broken}
    where = np.flatnonzero(good)
    return Output(columns, drop, bad | {int(where[row]): text for row, text in output.broken.items()})


def _array(values: Any) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        return values.combine_chunks()
    if isinstance(values, pa.Array):
        return values
    return pa.array(values)


def read_reduced(plan: Plan, node: int, number: int) -> pa.Table:
    """What a global node's reduction ended with, for one fragment."""
    folder = plan.folder(node, "reduced")
    info = storage.read_json(storage.join(folder, "done.json"))
    if "partitions" in info:
        return read_result(plan, node, number, info["partitions"])
    name = "all.parquet" if info["shared"] else f"{number:05d}.parquet"
    return storage.read_table(storage.join(folder, name))


def output_table(node: Node, made: Sequence[pa.Field], rows: Rows, output: Output) -> pa.Table:
    """A node's file for one fragment, checked against what the stage promised.

    Raises:
        DataError: a column is missing, too many, of the wrong length or type, or rows dropped by a stage that does not.
    """
    stage, count = node.stage, len(rows)
    where = f"Stage {node.name!r} on fragment {rows.fragment}"
    names = [each.name for each in made]
    if set(output.columns) != set(names):
        raise DataError(f"{where} returned columns {sorted(output.columns)}, but it promises {sorted(names)}.")
    columns: dict[str, pa.Array] = {"row": pa.array(rows.positions, pa.int32())}
    for each in made:
        try:
            values = output.columns[each.name]
            array = _array(values) if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, each.type)
            columns[each.name] = array.cast(each.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise DataError(f"{where}: column {each.name!r} does not hold {each.type}: {error}.") from error
        if len(array) != count:
            raise DataError(f"{where} returned {len(array)} values of {each.name!r} for {count} rows.")
    if stage.drops:
        drop = [None] * count if output.drop is None else list(output.drop)
        if len(drop) != count:
            raise DataError(f"{where} returned {len(drop)} drop reasons for {count} rows.")
        broken = [output.broken.get(row) for row in range(count)]
        columns["drop"] = pa.array(drop, pa.string())
        columns["broken"] = pa.array(broken, pa.string())
    elif output.broken or (output.drop is not None and any(reason is not None for reason in output.drop)):
        raise DataError(f"{where} dropped rows, but its class does not say `drops = True`.")
    return pa.table(columns)
