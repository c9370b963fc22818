"""The section on an evaluation: every metric beside chance, and queries with what the model found for them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cl import storage
from cl.corpus import Corpus, open_corpus
from cl.errors import DataError
from pipelines.report.pictures import Thumbnails
from pipelines.report.runs import Run
from pipelines.report.wording import clean, count, number, words

QUERIES = 10  # a corpus
TOP = 5
COLUMNS = ("id", "key", "shard", "offset", "length", "text", "anchor", "positive")


def evaluation_section(run: Run, pictures: Thumbnails) -> dict[str, Any]:
    """What the page shows of an evaluation."""
    result = run.json("eval.json")
    corpora = result.get("corpora") or {}
    paths = corpus_paths(run)
    return {
        "checkpoint": result.get("checkpoint"),
        "corpora": [
            {
                "name": name,
                "samples": count(found.get("samples")),
                "metrics": [metric_row(m) for m in found.get("metrics") or []],
                "examples": _examples(run, found, paths.get(name, found.get("path")), pictures),
            }
            for name, found in corpora.items()
            if isinstance(found, dict)
        ],
    }


def corpus_paths(run: Run) -> dict[str, str]:
    """Corpus name -> path, from the run's config."""
    value = run.config.get("corpora") or {}
    if isinstance(value, list):
        return {str(c.get("name")): str(c.get("path")) for c in value if isinstance(c, dict)}
    return {str(k): str(v.get("path") if isinstance(v, dict) else v) for k, v in value.items()}


def metric_row(metric: dict[str, Any]) -> dict[str, Any]:
    """A metric beside chance, and how many times better than chance it is where that means something."""
    value, chance = metric.get("value"), metric.get("chance")
    higher = metric.get("higher_is_better", True)
    times = ""
    if isinstance(value, (int, float)) and isinstance(chance, (int, float)) and value > 0 and chance > 0:
        ratio = value / chance if higher else chance / value
        times = f"{number(ratio, 2)}×"
    name = str(metric.get("metric", ""))
    return {
        "name": clean(name, 90),
        "value": number(value),
        "chance": number(chance) if chance is not None else "-",
        "times": times,
        "better": "higher" if higher else "lower",
        "share": 100 * value if isinstance(value, (int, float)) and 0 <= value <= 1 and higher else None,
        "chance_share": 100 * chance if isinstance(chance, (int, float)) and 0 <= chance <= 1 else None,
    }


def _examples(run: Run, found: dict[str, Any], path: str | None, pictures: Thumbnails) -> list[dict[str, Any]]:
    examples = [e for e in found.get("examples") or [] if isinstance(e, dict)][:QUERIES]
    if not examples:
        return []
    wanted = {str(i) for e in examples for i in [*(e.get("top") or [])[:TOP], e.get("query_id")] if i}
    corpus, rows = None, {}
    try:
        corpus = open_corpus(str(path)) if path else None
        rows = rows_by_id(corpus, wanted) if corpus is not None else {}
    except DataError as error:
        run.note(f"The retrieval examples have no pictures: {error}")
    shown = []
    for example in examples:
        right = str(example.get("query_id"))
        answers = []
        for place, each in enumerate((example.get("top") or [])[:TOP], start=1):
            row = rows.get(str(each), {})
            text = clean(row.get("text") or row.get("positive") or "", 100)
            hit = str(each) == right
            note = {"caption": text, "key": clean(row.get("key") or str(each), 60), "mark": "right" if hit else ""}
            if row.get("offset") is not None:
                alt = f"answer {place}: {text}"
                answers.append(pictures.of_sample([corpus.root if corpus else ""], row, alt=alt, **note))
            else:
                answers.append(note)
        shown.append(
            {
                "query": clean(example.get("query") or rows.get(right, {}).get("anchor", "")),
                "rank": count(example.get("rank")),
                "direction": words(example.get("direction") or ""),
                "answers": answers,
                "with_images": any(rows.get(str(i), {}).get("offset") is not None for i in example.get("top") or []),
            }
        )
    return shown


def rows_by_id(corpus: Corpus, ids: set[str]) -> dict[str, dict[str, Any]]:
    """The rows of some ids, read fragment by fragment until all are found."""
    found: dict[str, dict[str, Any]] = {}
    wanted = pa.array(sorted(ids), pa.string())
    for fragment in corpus.fragments:
        with storage.open_parquet(corpus.fragment_url(fragment)) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            table = file.read(columns=columns)
        found |= {row["id"]: row for row in table.filter(pc.is_in(table["id"], wanted)).to_pylist()}
        if len(found) == len(ids):
            break
    return found
