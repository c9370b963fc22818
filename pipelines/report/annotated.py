"""The rows of a corpus or of a curation run: all of a small one, an even part of a large one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cl import storage
from cl.errors import DataError
from pipelines.report.runs import Run

MAX_ROWS = 300_000  # rows held in memory for examples and histograms; counts come from the manifests and are exact


@dataclass
class Rows:
    """Rows of the light plane with whatever columns a stage has added."""

    table: pa.Table
    total: int  # rows there are, of which `table` holds all or an even part

    @property
    def sampled(self) -> bool:
        return self.table.num_rows < self.total

    def has(self, name: str) -> bool:
        return name in self.table.column_names

    def numbers(self, name: str) -> np.ndarray | None:
        """A numeric column as float64 with NaN for null, or None if there is no such column."""
        if not self.has(name):
            return None
        column = self.table[name]
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            return None
        return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), float)

    def where(self, mask: Any) -> Rows:
        table = self.table.filter(mask)
        return Rows(table, table.num_rows)

    def by_id(self, limit: int) -> list[dict[str, Any]]:
        """The first rows in the order of their ids: as ids are hashes, an even and repeatable choice."""
        table = self.table
        if table.num_rows > limit and self.has("id"):
            order = pc.select_k_unstable(table.select(["id"]), limit, sort_keys=[("id", "ascending")])
            table = table.take(order)
        return [dict(row) for row in table.slice(0, limit).to_pylist()]

    def find(self, ids: set[str]) -> dict[str, dict[str, Any]]:
        """The rows of some ids, by id."""
        if not ids or not self.has("id"):
            return {}
        part = self.table.filter(pc.is_in(self.table["id"], pa.array(sorted(ids), pa.string())))
        return {row["id"]: row for row in part.to_pylist()}


def load_rows(run: Run, folder: str) -> Rows | None:
    """Rows of every parquet file of a folder of the run, only columns of plain values; None if there is no file.

    An unreadable file is left out and named in the run's `problems`.
    """
    names = storage.list_files(run.url(folder), ".parquet")
    sizes: dict[str, int] = {}
    for name in names:
        try:
            with storage.open_parquet(run.url(folder, name)) as file:
                sizes[name] = file.metadata.num_rows
        except (DataError, pa.ArrowException, OSError) as error:
            run.note(str(error) if isinstance(error, DataError) else f"{folder}/{name} cannot be read.")
    total = sum(sizes.values())
    if not sizes:
        return None
    share = min(1.0, MAX_ROWS / max(total, 1))
    tables, taken, wanted = [], 0, 0.0
    for name, size in sizes.items():
        wanted += size * share
        rows = min(size, round(wanted) - taken)
        if rows > 0 or size == 0:
            tables.append(_plain(run.url(folder, name), rows))
            taken += rows
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    return Rows(table, total)


def _plain(url: str, rows: int) -> pa.Table:
    """The first `rows` rows, without lists and vectors."""
    with storage.open_parquet(url) as file:
        columns = [field.name for field in file.schema_arrow if not pa.types.is_nested(field.type)]
        columns = [name for name in columns if not pa.types.is_binary(file.schema_arrow.field(name).type)]
        parts, have = [], 0
        for group in range(file.metadata.num_row_groups):
            if have >= rows:
                break
            part = file.read_row_group(group, columns=columns)
            parts.append(part.slice(0, rows - have))
            have += parts[-1].num_rows
        return pa.concat_tables(parts) if parts else file.schema_arrow.empty_table().select(columns)


def first_column(rows: Rows, names: tuple[str, ...]) -> str | None:
    """The first of some columns that is there."""
    return next((name for name in names if rows.has(name)), None)


def caption_words(rows: Rows) -> np.ndarray | None:
    """Words (runs of characters between white space) of each caption or anchor."""
    name = next((n for n in ("text", "anchor") if rows.has(n)), None)
    if name is None:
        return None
    lengths = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(rows.table[name])))
    empty = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(rows.table[name])), 0)
    return np.asarray(pc.if_else(empty, 0, lengths).cast(pa.float64()).to_numpy(zero_copy_only=False), float)


def text_of(row: dict[str, Any]) -> str:
    """What stands for a sample in words: its caption, or both texts of a pair."""
    if row.get("text") is not None:
        return str(row["text"])
    if row.get("anchor") is not None:
        return f"{row['anchor']} → {row.get('positive', '')}"
    return ""
