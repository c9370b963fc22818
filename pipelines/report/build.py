"""`clew report`: one HTML page over any set of run folders, which opens without a network and without other files."""

from __future__ import annotations

import datetime
from typing import Any

import jinja2
from pydantic import BaseModel

import cl
from cl import storage
from pipelines.report.corpora import corpus_section, curation_section
from pipelines.report.evaluation import evaluation_section
from pipelines.report.pictures import Thumbnails
from pipelines.report.runs import Run, absolute, find_runs
from pipelines.report.summary import TITLES, summarise_runs
from pipelines.report.sweeps import sweep_section
from pipelines.report.training import training_section
from pipelines.report.wording import clean, count, duration, number, percent, words

MAX_BYTES = 8_000_000  # of the whole page; pictures get what the text and the charts are unlikely to need
PICTURE_BYTES = 6_000_000
MAX_CONFIG = 20_000  # characters of a config that are shown

# What each kind is for, as the page says it below the heading.
PURPOSES = {
    "ingest": "What came in, and what could not be used.",
    "curate": "What was kept, what was dropped, and why.",
    "train": "How the model learned.",
    "eval": "What the model can do, beside chance.",
    "sweep": "Which settings work best.",
    "embed": "Embeddings of a corpus.",
}


class ReportResult(BaseModel):
    """What was written."""

    path: str
    bytes: int
    runs: dict[str, str]  # name -> kind
    pictures: int  # thumbnails in the page
    problems: list[str]  # sentences: what is missing or unfinished


def build_report(dirs: list[str], out: str) -> ReportResult:
    """Write one self-contained HTML page on the runs in some folders.

    Args:
        dirs: run folders, or folders that hold run folders.
        out: path or URL of the page.

    Raises:
        DataError: a folder does not exist, none holds a run, or `out` cannot be written.
    """
    runs = find_runs(dirs)
    pictures = Thumbnails(PICTURE_BYTES)
    sections = [{"run": run, "data": _section(run, pictures), "lineage": _lineage(run, runs)} for run in runs]
    summary = summarise_runs(runs)
    page = _environment().get_template("report.html.j2").render(
        sections=sections,
        summary=summary,
        pictures=pictures,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=cl.__version__,
        versions=_versions(runs),
    )  # fmt: skip
    data = page.encode("utf-8", "replace")
    storage.write_bytes(out, data)
    return ReportResult(
        path=str(out),
        bytes=len(data),
        runs={run.name: run.kind for run in runs},
        pictures=pictures.made,
        problems=summary.problems,
    )


def _section(run: Run, pictures: Thumbnails) -> dict[str, Any]:
    if run.kind == "ingest":
        return corpus_section(run, pictures)
    if run.kind == "curate":
        return curation_section(run, pictures)
    if run.kind == "train":
        return training_section(run)
    if run.kind == "eval":
        return evaluation_section(run, pictures)
    if run.kind == "sweep":
        return sweep_section(run)
    return {}


def _lineage(run: Run, runs: list[Run]) -> list[dict[str, str]]:
    """The paths in a run's config that are other runs of the page (or lie within them)."""
    found: dict[str, dict[str, str]] = {}
    for name, value in _strings(run.config):
        place = absolute(value) + "/"
        for other in runs:
            if other is not run and place.startswith(other.path.rstrip("/") + "/"):
                found[other.path] = {"field": name, "anchor": other.anchor, "name": other.name}
    return list(found.values())


def _strings(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(name, value)]
    if isinstance(value, dict):
        return [pair for key, each in value.items() for pair in _strings(each, f"{name}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [pair for each in value for pair in _strings(each, name)]
    return []


def _versions(runs: list[Run]) -> dict[str, list[str]]:
    """Package -> the versions that the runs were made with (more than one where they differ)."""
    found: dict[str, list[str]] = {}
    for run in runs:
        versions = run.info.get("versions")
        for name, version in (versions if isinstance(versions, dict) else {}).items():
            if str(version) not in found.setdefault(str(name), []):
                found[str(name)].append(str(version))
    return found


def _environment() -> jinja2.Environment:
    """Templates with escaping on whatever the file's name: captions are anybody's text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        clean=clean, count=count, number=number, percent=percent, duration=duration, words=words,
        config=lambda text: text[:MAX_CONFIG],
    )  # fmt: skip
    environment.globals.update(titles=TITLES, purposes=PURPOSES)
    return environment
