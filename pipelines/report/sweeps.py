"""The section on a sweep: its trials as a table and, over two axes, as a heat map."""

from __future__ import annotations

import math
from typing import Any

from pipelines.report import charts
from pipelines.report.runs import Run
from pipelines.report.wording import clean, count, duration, number, percent

TRIALS = 100


def sweep_section(run: Run) -> dict[str, Any]:
    """What the page shows of a sweep."""
    result = run.json("sweep.json")
    trials = [t for t in result.get("trials") or [] if isinstance(t, dict)]
    mode = result.get("mode", "max")
    axes = [str(a) for a in result.get("axes") or sorted({k for t in trials for k in t.get("parameters") or {}})]
    best = (result.get("best") or {}).get("id")
    ordered = sorted(trials, key=lambda t: _rank(t.get("value"), mode))
    return {
        "metric": clean(result.get("metric", ""), 80),
        "mode": mode,
        "chance": number(result["chance"]) if result.get("chance") is not None else "",
        "axes": axes,
        "total": len(trials),
        "trials": [
            {
                "id": clean(trial.get("id"), 24),
                "parameters": [_setting((trial.get("parameters") or {}).get(axis)) for axis in axes],
                "value": number(trial.get("value")),
                "status": clean(trial.get("status", ""), 24),
                "steps": count(trial.get("steps")),
                "time": duration(trial.get("seconds")),
                "best": trial.get("id") is not None and trial.get("id") == best,
            }
            for trial in ordered[:TRIALS]
        ],
        "heat_map": heat_map(trials, axes, mode, str(result.get("metric", "value"))),
    }


def _rank(value: Any, mode: str) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.inf
    return -value if mode == "max" else value


def _setting(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else clean(value, 40)


def heat_map(trials: list[dict[str, Any]], axes: list[str], mode: str, metric: str) -> Any:
    """The best value of each cell of the first two axes; '' with fewer than two axes or values."""
    if len(axes) < 2:
        return ""
    cells: dict[tuple[Any, Any], float] = {}
    for trial in trials:
        value = trial.get("value")
        if isinstance(value, (int, float)) and math.isfinite(value):
            place = tuple(_hashable((trial.get("parameters") or {}).get(axis)) for axis in axes[:2])
            better = max if mode == "max" else min
            cells[place] = better(cells.get(place, value), value)
    rows = sorted({r for r, _ in cells}, key=_order)
    columns = sorted({c for _, c in cells}, key=_order)
    if not cells or len(rows) * len(columns) < 2 or len(rows) > 16 or len(columns) > 16:
        return ""
    top = (max if mode == "max" else min)(cells, key=lambda place: cells[place])
    return charts.heat_map(
        f"{metric} by {axes[0]} and {axes[1]}; best {number(cells[top])}",
        [_setting(r) for r in rows], [_setting(c) for c in columns],
        [[cells.get((r, c)) for c in columns] for r in rows],
        axes[0], axes[1], (rows.index(top[0]), columns.index(top[1])),
    )  # fmt: skip


def _hashable(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def best_trial(result: dict[str, Any]) -> tuple[str, str] | None:
    """The best trial's settings and value as words, or None."""
    best = result.get("best") or {}
    if not isinstance(best.get("value"), (int, float)):
        return None
    settings = ", ".join(f"{k.rsplit('.', 1)[-1]} {_setting(v)}" for k, v in (best.get("parameters") or {}).items())
    value = best["value"]
    return settings, percent(value) if 0 <= value <= 1 and result.get("mode", "max") == "max" else number(value)
