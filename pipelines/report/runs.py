"""Which run folders there are, and what kind each is, told by their files alone."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson
import yaml

from cl import storage
from cl.errors import DataError

RunKind = Literal["ingest", "curate", "train", "eval", "sweep", "embed"]
KINDS: tuple[RunKind, ...] = ("ingest", "curate", "train", "eval", "sweep", "embed")

# A folder is of the first kind of which it holds one of the files or folders; a curated corpus is a corpus too.
MARKS: tuple[tuple[RunKind, tuple[str, ...]], ...] = (
    ("sweep", ("sweep.json",)),
    ("eval", ("eval.json",)),
    ("curate", ("funnel.json", "annotated")),
    ("train", ("metrics.jsonl", "checkpoints")),
    ("ingest", ("corpus.json", "samples", "quarantine")),
)
MAX_DEPTH = 4  # folders below the one that was given
MAX_NAME_PARTS = 3  # folders in a run's name
MAX_METRIC_BYTES = 64 << 20  # of a metrics.jsonl; only the end of a longer one is read


@dataclass
class Run:
    """One run folder: what its files say, read without failing where they are missing or damaged."""

    kind: RunKind
    path: str
    name: str  # unique in one report
    info: dict[str, Any] = field(default_factory=dict)  # run.json
    config_text: str = ""  # config.yaml as it stands
    problems: list[str] = field(default_factory=list)  # sentences: what is missing, unfinished or unreadable

    @property
    def anchor(self) -> str:
        """The id of the run's section in the page."""
        return "run-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in self.name.lower())

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config, or {} where there is none."""
        try:
            data = yaml.safe_load(self.config_text)
        except yaml.YAMLError:
            return {}
        return data if isinstance(data, dict) else {}

    def note(self, sentence: str) -> None:
        """Add a sentence on what is missing or damaged, once."""
        if sentence not in self.problems:
            self.problems.append(sentence)

    @property
    def status(self) -> str:
        return str(self.info.get("status", "unknown"))

    def url(self, *parts: str) -> str:
        return storage.join(self.path, *parts)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; {} with a sentence in `problems` where it is missing or damaged."""
        url = self.url(name)
        try:
            data = storage.read_json(url)
        except DataError as error:
            missing = not storage.exists(url)
            self.note(f"{name} is missing: the run has not got that far." if missing else str(error))
            return {}
        if not isinstance(data, dict):
            self.note(f"{name} does not hold a JSON object.")
            return {}
        return data

    def json_lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a JSON-lines file; a line that was cut off by a kill is left out and said so."""
        fs, path = storage.open_fs(self.url(name))
        try:
            size = fs.size(path)
            start = max(0, size - MAX_METRIC_BYTES)
            data = fs.cat_file(path, start=start, end=size)
        except FileNotFoundError:
            self.note(f"{name} is missing: the run has not got that far.")
            return []
        lines = data.split(b"\n")[1 if start else 0 :]
        rows, broken = [], 0
        for line in lines:
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                broken += 1
                continue
            if isinstance(row, dict):
                rows.append(row)
        if broken:
            self.note(f"{broken} line{'s' if broken > 1 else ''} of {name} could not be read.")
        return rows


def find_runs(dirs: Iterable[str]) -> list[Run]:
    """The runs in the given folders or below them, in the order in which work flows (ingest first).

    Raises:
        DataError: a folder does not exist, or there is no run in any of them.
    """
    given = [absolute(str(each)) for each in dirs]
    found: dict[str, RunKind] = {}
    for root in given:
        fs, path = storage.open_fs(root)
        if not fs.isdir(path):
            raise DataError(f"Run folder {root} does not exist.")
        _walk(root, MAX_DEPTH, found)
    if not found:
        raise DataError(
            f"No run was found in {', '.join(given) or 'no folder'}: expected what `clew ingest`, `curate`, `train`, "
            "`eval` or `sweep` writes, such as a run.json."
        )
    names = _names(list(found))
    runs = [_open(kind, path, names[path]) for path, kind in found.items()]
    return sorted(runs, key=lambda run: (KINDS.index(run.kind), str(run.info.get("started", "")), run.path))


def absolute(path: str) -> str:
    """A local path from the root and without detours, so that equal places are equal text; a URL as it is."""
    return path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))


def _walk(url: str, depth: int, found: dict[str, RunKind]) -> None:
    fs, path = storage.open_fs(url)
    entries = {posixpath.basename(e["name"].rstrip("/")): e["type"] for e in fs.ls(path, detail=True)}
    kind = _kind(url, set(entries))
    if kind is not None:
        found.setdefault(url, kind)
        return
    if depth:
        for name in sorted(entries):
            if entries[name] == "directory" and not name.startswith("."):
                _walk(storage.join(url, name), depth - 1, found)


def _kind(url: str, entries: set[str]) -> RunKind | None:
    """The kind of a folder by its run.json, else by the other files in it; None if it is no run."""
    if "run.json" in entries:
        try:
            data = storage.read_json(storage.join(url, "run.json"))
        except DataError:
            data = None
        command = data.get("command") if isinstance(data, dict) else None
        for kind in KINDS:
            if command == kind:
                return kind
    return next((kind for kind, marks in MARKS if not entries.isdisjoint(marks)), None)


def _open(kind: RunKind, path: str, name: str) -> Run:
    run = Run(kind, path, name)
    if storage.exists(run.url("run.json")):
        run.info = run.json("run.json")
    if storage.exists(run.url("config.yaml")):
        fs, inner = storage.open_fs(run.url("config.yaml"))
        run.config_text = fs.cat_file(inner).decode("utf-8", "replace")
    if run.status in ("running", "interrupted", "failed"):
        word = {"running": "had not ended when this page was made", "interrupted": "was interrupted"}
        error = f": {run.info['error']}" if run.info.get("error") else "."
        run.note(f"This run {word.get(run.status, 'failed')}{error}")
    return run


def _names(paths: list[str]) -> dict[str, str]:
    """What tells each path from the others: its part below their common folder, or its own name if it is alone.

    Paths from far apart get the shortest tails that are all different.
    """
    parts = {path: [part for part in path.split("/") if part] or [path] for path in paths}
    shared = 0
    while len({tuple(each[: shared + 1]) for each in parts.values()}) == 1 and shared < max(map(len, parts.values())):
        shared += 1
    names = {path: each[min(shared, len(each) - 1) :] for path, each in parts.items()}
    if max(map(len, names.values())) > MAX_NAME_PARTS:
        for length in range(1, max(map(len, parts.values())) + 1):
            names = {path: each[-length:] for path, each in parts.items()}
            if len({tuple(name) for name in names.values()}) == len(paths):
                break
    return {path: "/".join(name) for path, name in names.items()}
