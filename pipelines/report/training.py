"""The section on a training run: its curves, its pace and its checkpoints."""

from __future__ import annotations

import math
from typing import Any

from cl import storage
from pipelines.report import charts
from pipelines.report.runs import Run
from pipelines.report.wording import brief, count, duration, number, words

# Field of metrics.jsonl, title, whether the axis begins at 0. Other numeric fields are drawn after these.
CURVES = (
    ("loss", "Loss", False),
    ("temperature", "Temperature", False),
    ("logit_scale", "Logit scale (1 / temperature)", False),
    ("lr", "Learning rate", True),
    ("grad_norm", "Gradient norm before clipping", True),
    ("samples_per_second", "Samples a second", True),
    ("data_wait", "Waiting for data (share of the time)", True),
)
NOT_CURVES = {"step", "epoch", "samples", "seconds", "time"}
MORE_CURVES = 6


def training_section(run: Run) -> dict[str, Any]:
    """What the page shows of a training run."""
    metrics = run.json_lines("metrics.jsonl")
    summary = run.json("summary.json") if storage.exists(run.url("summary.json")) else {}
    if not summary and run.status == "finished":
        run.note("summary.json is missing.")
    return {"facts": _facts(run, summary, metrics), "charts": _curves(metrics), "steps": len(metrics)}


def _facts(run: Run, summary: dict[str, Any], metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    last = metrics[-1] if metrics else {}
    first = metrics[0] if metrics else {}
    config = run.config
    facts = [
        ("steps", count(summary.get("steps", last.get("step")))),
        ("samples seen", count(summary.get("samples", last.get("samples")))),
        ("samples/s", number(summary.get("samples_per_second", last.get("samples_per_second")))),
        ("loss, first to last", f"{brief(summary.get('loss_first', first.get('loss')), 4)} to "
                                f"{brief(summary.get('loss_last', last.get('loss')), 4)}"),
        ("time", duration(summary.get("seconds", last.get("seconds")))),
        ("workers", count(summary.get("workers"))),
        ("global batch", count(config.get("batch_size"))),
    ]  # fmt: skip
    if summary.get("checkpoint"):
        facts.append(("checkpoint", str(summary["checkpoint"])))
    return [(name, value) for name, value in facts if value not in ("-", "- to -")]


def _curves(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {name for name, _, _ in CURVES}
    others = sorted({k for row in metrics for k, v in row.items() if _plain(v)} - known - NOT_CURVES)
    wanted = [*CURVES, *((name, words(name).capitalize(), False) for name in others[:MORE_CURVES])]
    found = []
    for name, title, zero in wanted:
        rows = [row for row in metrics if _plain(row.get(name)) and _plain(row.get("step"))]
        if not rows:
            continue
        y = [float(row[name]) for row in rows]
        bad = sum(not math.isfinite(v) for v in y)
        svg = charts.lines(f"{title} by step", [charts.Series(title, [float(r["step"]) for r in rows], y)], zero=zero)
        note = f"{brief(y[0], 4)} at first, {brief(y[-1], 4)} at last" if len(y) > 1 else brief(y[0], 4)
        found.append({"title": title, "svg": svg, "note": note + (f"; {bad} values are not finite" if bad else "")})
    return found


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
