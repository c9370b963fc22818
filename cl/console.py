"""How commands speak: results on stdout (a table, or JSON alone), everything else on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

STATUS_STYLES = {"ok": "green", "finished": "green", "warn": "yellow", "fail": "bold red", "failed": "bold red"}
MAX_ROWS = 40  # of a table on a terminal; --json prints all


@contextlib.contextmanager
def stdout_kept_for_json() -> Iterator[None]:
    """Send whatever the block (and the processes it starts) prints on stdout to stderr, and silence progress."""
    os.environ["CLEW_QUIET"] = "1"
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()
        os.dup2(saved, 1)
        os.close(saved)


def plain(result: Any) -> Any:
    """A result as what JSON knows: models and dataclasses become mappings, paths and the like become text."""
    if hasattr(result, "model_dump"):
        return result.model_dump(mode="json")
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: plain(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        return {str(key): plain(value) for key, value in result.items()}
    if isinstance(result, (list, tuple, set)):
        return [plain(value) for value in result]
    if hasattr(result, "item") and getattr(result, "ndim", 0) == 0:  # a number of numpy or torch
        return result.item()
    return result if result is None or isinstance(result, (str, int, float, bool)) else str(result)


def print_json(result: Any) -> None:
    """Print one JSON document on stdout; NaN and infinity, which JSON lacks, become null."""
    import orjson

    sys.stdout.write(orjson.dumps(plain(result), option=orjson.OPT_INDENT_2).decode() + "\n")
    sys.stdout.flush()


def print_result(title: str, result: Any) -> None:
    """Print a run's result: its single values as one table, every list of rows in it as another."""
    from rich.console import Console

    console = Console()
    values: dict[str, Any] = {}
    tables: list[tuple[str, list[dict[str, Any]]]] = []
    # A result with more in it than a person reads says what to show; --json prints everything.
    shown = result.shown() if hasattr(result, "shown") else result
    _collect("", plain(shown), values, tables)
    if values:
        _print_rows(console, title, [{"": name, " ": value} for name, value in values.items()], header=False)
    for name, rows in tables:
        _print_rows(console, name, rows)


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as a table."""
    from rich.console import Console

    _print_rows(Console(), title, rows, limit=None)


def _collect(prefix: str, data: Any, values: dict[str, Any], tables: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Sort a tree into single values (dotted names) and tables."""
    if isinstance(data, dict):
        for key, value in data.items():
            _collect(f"{prefix}.{key}" if prefix else key, value, values, tables)
    elif isinstance(data, list) and data and all(isinstance(row, dict) for row in data):
        rows = [{key: value for key, value in row.items() if not _is_rows(value)} for row in data]
        tables.append((prefix, rows))
    elif isinstance(data, list):
        values[prefix] = ", ".join(map(_cell, data))
    else:
        values[prefix] = data


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value)


def _print_rows(
    console: Any, title: str, rows: list[dict[str, Any]], header: bool = True, limit: int | None = MAX_ROWS
) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=header, pad_edge=False
    )
    for column in columns:
        numbers = all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        table.add_column(column.replace("_", " "), justify="right" if numbers and header else "left", overflow="fold")
    for row in rows[:limit]:
        table.add_row(*(Text(_cell(row.get(c)), _style(c, row.get(c))) for c in columns))
    console.print(table)
    if limit is not None and len(rows) > limit:
        console.print(f"... and {len(rows) - limit} more rows (--json prints all)", style="dim")


def _style(column: str, value: Any) -> str:
    return STATUS_STYLES.get(str(value), "") if column == "status" else ""


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value)
