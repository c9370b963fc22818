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
    ordered = sorted(trials, key=lambda t: (t.get("status") == "stopped", _rank(t.get("value"), mode)))
    return {
        "metric": clean(result.get("metric", ""), 80),
        "mode": mode,
        "chance": number(result["chance"]) if result.get("chance") is not None else "",
        "budget": count(result["samples"]) if result.get("samples") else "",
        "axes": axes,
        "total": len(trials),
        "trials": [
            {
                "id": clean(trial.get("id"), 24),
                "parameters": [_setting((trial.get("parameters") or {}).get(axis)) for axis in axes],
                "value": number(trial.get("value")),
                "error": f"± {number(trial['stderr'], 2)}" if trial.get("stderr") else "",
                "status": clean(trial.get("error") or trial.get("status", ""), 120),
                "steps": count(trial.get("steps")),
                "time": duration(trial.get("seconds")),
                "best": trial.get("id") is not None and trial.get("id") == best,
            }
            for trial in ordered[:TRIALS]
        ],
        "heat_map": heat_map(trials, axes, mode, str(result.get("metric", "value"))),
        "courses": courses(trials, best),
    }


def courses(trials: list[dict[str, Any]], best: Any) -> Any:
    """The score of every trial along its samples, the best one in colour; '' if none was scored twice."""
    series = []
    for trial in sorted(trials, key=lambda t: t.get("id") == best):  # the best is drawn last, above the others
        points = [e for e in trial.get("evaluations") or [] if isinstance(e, dict) and _finite(e.get("value"))]
        if len(points) > 1:
            name = ", ".join(
                f"{k.rsplit('.', 1)[-1]} {_setting(v)}" for k, v in (trial.get("parameters") or {}).items()
            )
            x, y = ([float(e.get(field) or 0) for e in points] for field in ("samples", "value"))
            series.append(charts.Series(name, x, y, faint=trial.get("id") != best))
    return charts.lines("Score of every trial by samples seen", series[-40:], x_label="samples") if series else ""


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _rank(value: Any, mode: str) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return math.inf
    return -value if mode == "max" else value


def _setting(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else clean(value, 40)


def heat_map(trials: list[dict[str, Any]], axes: list[str], mode: str, metric: str) -> Any:
    """The best value of each cell of the first two axes; '' with fewer than two axes or values.

    Trials that were stopped before their budget was used up are left out: their scores are of shorter training.
    """
    if len(axes) < 2:
        return ""
    cells: dict[tuple[Any, Any], float] = {}
    for trial in trials:
        value = trial.get("value")
        place = tuple(_hashable((trial.get("parameters") or {}).get(axis)) for axis in axes[:2])
        if trial.get("status") == "stopped" or value is None or not _finite(value):
            cells.setdefault(place, math.nan)
        elif not cells.get(place, math.nan) * (1 if mode == "max" else -1) >= value * (1 if mode == "max" else -1):
            cells[place] = value
    rows = sorted({r for r, _ in cells}, key=_order)
    columns = sorted({c for _, c in cells}, key=_order)
    known = {place: value for place, value in cells.items() if math.isfinite(value)}
    if not known or len(rows) * len(columns) < 2 or len(rows) > 16 or len(columns) > 16:
        return ""
    top = (max if mode == "max" else min)(known, key=lambda place: known[place])
    return charts.heat_map(
        f"{metric} by {axes[0]} and {axes[1]}; best {number(known[top])}",
        [_setting(r) for r in rows],
        [_setting(c) for c in columns],
        [[cells.get((r, c)) for c in columns] for r in rows],
        axes[0],
        axes[1],
        (rows.index(top[0]), columns.index(top[1])),
    )


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
