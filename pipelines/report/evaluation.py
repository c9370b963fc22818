"""The section on an evaluation: every metric beside chance, and queries with what the model found for them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cl import storage
from cl.corpus import Corpus, open_corpus
from cl.errors import DataError
from pipelines.report.pictures import Thumbnails
from pipelines.report.runs import Run, absolute
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
        times = f"{number(value / chance if higher else chance / value, 2)}×"
    share = value if isinstance(value, (int, float)) and 0 <= value <= 1 and higher else None
    error = metric.get("stderr")
    return {
        "name": clean(metric.get("metric", ""), 90),
        "value": number(value),
        "error": f"± {number(error, 2)}" if isinstance(error, (int, float)) else "",
        "chance": number(chance) if chance is not None else "-",
        "times": times,
        "better": "higher" if higher else "lower",
        "among": count(metric.get("candidates")) if metric.get("candidates") else "",
        "share": 100 * share if share is not None else None,
        "chance_share": 100 * chance if share is not None and isinstance(chance, (int, float)) else None,
    }


def _examples(run: Run, found: dict[str, Any], path: str | None, pictures: Thumbnails) -> list[dict[str, Any]]:
    """Examples of each direction in turn, at most `QUERIES` of each, with pictures where the answers are images."""
    given = [e for e in found.get("examples") or [] if isinstance(e, dict)]
    examples: list[dict[str, Any]] = []
    for direction in dict.fromkeys(str(e.get("direction") or "") for e in given):
        examples += [e for e in given if str(e.get("direction") or "") == direction][:QUERIES]
    if not examples:
        return []
    wanted = {str(i) for e in examples for i in [*(e.get("top") or [])[:TOP], e.get("query_id")] if i}
    root, rows = "", {}
    try:
        if path:
            corpus = open_corpus(absolute(path))
            root, rows = corpus.root, rows_by_id(corpus, wanted)
    except DataError as error:
        run.note(f"The retrieval examples have no pictures: {error}")
    return [_example(example, root, rows, pictures) for example in examples]


def _example(
    example: dict[str, Any], root: str, rows: dict[str, dict[str, Any]], pictures: Thumbnails
) -> dict[str, Any]:
    direction = str(example.get("direction") or "text_to_image")
    right = str(example.get("query_id"))
    top = [str(each) for each in (example.get("top") or [])[:TOP]]
    texts, hits, scores = (example.get(f"top_{name}") or [] for name in ("texts", "correct", "scores"))
    to_images = direction.endswith("_to_image")
    answers: list[Any] = []
    for place, each in enumerate(top):
        row = rows.get(each, {})
        text = texts[place] if place < len(texts) else row.get("text") or row.get("positive") or ""
        hit = bool(hits[place]) if place < len(hits) else each == right
        caption = clean(text, 100)
        score = (("score", number(scores[place])),) if place < len(scores) else ()
        note = {"caption": caption, "key": clean(row.get("key") or each, 60), "mark": "right" if hit else ""}
        if to_images:
            alt = f"answer {place + 1}: {caption}"
            answers.append(pictures.of_sample([root], row, alt=alt, values=score, **note))
        else:
            answers.append(note | {"values": score})
    query = clean(example.get("query") or rows.get(right, {}).get("anchor", ""))
    picture = None
    if direction.startswith("image_to_"):
        picture = pictures.of_sample([root], rows.get(right, {}), alt=f"query: {query}")
    return {
        "query": query,
        "picture": picture,
        "rank": count(example.get("rank")),
        "direction": words(direction),
        "answers": answers,
        "with_images": to_images,
    }


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
