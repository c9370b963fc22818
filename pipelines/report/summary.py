"""The numbers at the head of the page, which `clew demo` prints as a table at its end: computed here and only here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cl import storage
from pipelines.report.corpora import quarantine
from pipelines.report.runs import Run, find_runs
from pipelines.report.sweeps import best_trial
from pipelines.report.wording import count, number, percent, words

if TYPE_CHECKING:
    from rich.table import Table

# Metrics that belong at the head: retrieval at 1 and 5, zero-shot accuracy, and for text pairs MRR and nDCG.
HEADLINE = re.compile(r"R@[15]$|zero.?shot.*(accuracy|top-1)$|MRR|nDCG@10", re.IGNORECASE)
TITLES = {"ingest": "Ingest", "curate": "Curation", "train": "Training", "eval": "Evaluation", "sweep": "Sweep",
          "embed": "Embedding"}  # fmt: skip


@dataclass(frozen=True)
class SummaryRow:
    """One line: what it belongs to, what it is, its value as text and as a number, and the level of chance."""

    group: str
    name: str
    value: str
    number: float | None = None
    chance: str = ""
    parts: dict[str, int] = field(default_factory=dict)  # of which: reason -> count, the most frequent first


@dataclass(frozen=True)
class Summary:
    """What a set of runs came to."""

    rows: list[SummaryRow]
    problems: list[str]  # sentences: what is missing or unfinished, with the run's name

    def groups(self) -> list[tuple[str, list[SummaryRow]]]:
        """The rows by group, in order."""
        grouped: dict[str, list[SummaryRow]] = {}
        for row in self.rows:
            grouped.setdefault(row.group, []).append(row)
        return list(grouped.items())

    def table(self, title: str = "Clew") -> Table:
        """As a rich table for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("run")
        table.add_column("figure", ratio=1)
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("chance", justify="right", no_wrap=True)
        for group, rows in self.groups():
            for k, row in enumerate(rows):
                parts = "".join(f"\n  {count(n)} {reason}" for reason, n in row.parts.items())
                said = row.number is None  # words need more room than numbers
                cells = (group if k == 0 else "", f"{row.name}: {row.value}" if said else row.name + parts)
                figures = ("", "") if said else (row.value, row.chance)
                table.add_row(*(Text(cell) for cell in (*cells, *figures)), end_section=k == len(rows) - 1)
        return table


def summarise(dirs: Iterable[str]) -> Summary:
    """The summary of the runs in some folders.

    Raises:
        DataError: a folder does not exist or holds no run.
    """
    return summarise_runs(find_runs(dirs))


def summarise_runs(runs: list[Run]) -> Summary:
    """The summary of runs that are already opened."""
    readers = {"ingest": _ingest, "curate": _curate, "train": _train, "eval": _eval, "sweep": _sweep}
    rows: list[SummaryRow] = []
    for run in runs:
        reader = readers.get(run.kind)
        group = f"{TITLES[run.kind]} · {run.name}"
        rows += [SummaryRow(group=group, **line) for line in (reader(run) if reader else ())]
    return Summary(rows=rows, problems=[f"{run.name}: {problem}" for run in runs for problem in run.problems])


Line = dict[str, Any]  # the fields of a SummaryRow without its group


def _count(name: str, value: Any, parts: dict[str, int] | None = None) -> list[Line]:
    if not isinstance(value, (int, float)):
        return []
    ordered = sorted((parts or {}).items(), key=lambda item: (-item[1], item[0]))
    return [
        {"name": name, "value": count(value), "number": float(value), "parts": {words(k): v for k, v in ordered if v}}
    ]


def _ingest(run: Run) -> list[Line]:
    manifest = run.json("corpus.json")
    reasons: dict[str, int] = {}
    for (_, reason), n in quarantine(run)["reasons"]:
        reasons[reason] = reasons.get(reason, 0) + n
    return _count("samples", manifest.get("samples")) + _count("quarantined", manifest.get("quarantined"), reasons)


def _curate(run: Run) -> list[Line]:
    funnel = run.json("funnel.json")
    reasons: dict[str, int] = {}
    for stage in funnel.get("stages") or []:
        for reason, n in (stage.get("dropped") or {}).items():
            reasons[reason] = reasons.get(reason, 0) + int(n)
    lines = _count("samples in", funnel.get("in"))
    if funnel:
        lines += _count("dropped", sum(reasons.values()), reasons)
    return lines + _count("quarantined", funnel.get("quarantined")) + _count("kept", funnel.get("kept"))


def _train(run: Run) -> list[Line]:
    summary = run.json("summary.json") if storage.exists(run.url("summary.json")) else {}
    if not summary:
        run.note("Training has not ended: it has no summary.json yet.")
        metrics = run.json_lines("metrics.jsonl")
        return _count("steps so far", metrics[-1].get("step")) if metrics else []
    lines = _count("steps", summary.get("steps"))
    for name, key in (
        ("samples/s", "samples_per_second"),
        ("loss, first", "loss_first"),
        ("loss, last", "loss_last"),
    ):
        if isinstance(summary.get(key), (int, float)):
            lines.append({"name": name, "value": number(summary[key]), "number": float(summary[key])})
    return lines


def _eval(run: Run) -> list[Line]:
    corpora = run.json("eval.json").get("corpora") or {}
    lines: list[Line] = []
    for corpus, found in corpora.items():
        for metric in found.get("metrics") or []:
            name, value, chance = str(metric.get("metric")), metric.get("value"), metric.get("chance")
            if HEADLINE.search(name) and isinstance(value, (int, float)):
                prefix = f"{corpus}: " if len(corpora) > 1 else ""
                shown = {"value": percent(value), "number": float(value), "chance": percent(chance, 2)}
                lines.append({"name": prefix + metric_words(name), **shown})
    return lines


def metric_words(name: str) -> str:
    """A metric's name as words: `retrieval/text_to_image/R@1` is `text to image R@1`."""
    return words(name.split("retrieval/", 1)[-1]).replace("/", " ")


def _sweep(run: Run) -> list[Line]:
    result = run.json("sweep.json")
    lines = _count("trials", len(result.get("trials") or [])) if result else []
    best = best_trial(result)
    if best is not None:
        settings, value = best
        name = f"best {metric_words(str(result.get('metric')))}"
        chance = percent(result["chance"], 2) if isinstance(result.get("chance"), (int, float)) else ""
        lines.append({"name": name, "value": value, "number": float(result["best"]["value"]), "chance": chance})
        lines.append({"name": "best trial", "value": settings})
    return lines
