"""How values are spread before and after curation: histograms and the table of languages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from pipelines.report import charts
from pipelines.report.annotated import Rows, caption_words, first_column
from pipelines.report.wording import brief, count, words

LANGUAGES = 12  # rows of the table; the others are added up
# The columns that stages write; the first that is there is used.
LANGUAGE = ("text_language", "anchor_language", "language")
SCORE = ("image_text_score", "pair_score", "score")


def distributions(rows: Rows, kept: Rows | None) -> list[dict[str, Any]]:
    """Histograms of caption words, sizes, aspect and score; of what came in, and what was kept if that is known."""
    wanted: list[tuple[str, Callable[[Rows], np.ndarray | None], str]] = [
        ("Words of a caption" if rows.has("text") else "Words of an anchor", caption_words, "words"),
        ("Shorter side", _shorter_side, "pixels"),
        ("Aspect ratio", _aspect, "longer side / shorter side"),
    ]
    score = first_column(rows, SCORE)
    if score:
        wanted.append((words(score).capitalize(), lambda r: r.numbers(score), "score"))
    found = []
    for title, values_of, unit in wanted:
        before = values_of(rows)
        if before is None or not np.isfinite(before).any():
            continue
        after = values_of(kept) if kept is not None else None
        if np.nanmin(before) == np.nanmax(before):
            found.append({"title": title, "svg": "", "note": f"{brief(float(np.nanmin(before)))} for every sample"})
            continue
        edges = _edges(before[np.isfinite(before)])
        counted = bool((before[np.isfinite(before)] % 1 == 0).all()) and edges[1] - edges[0] == 1
        names = [f"{edge:g}" for edge in edges[:-1]] if counted else None  # a bin of one whole number is named by it
        counts_before = _counts(before, edges)
        counts_after = _counts(after, edges) if after is not None else counts_before
        svg = charts.histogram(
            f"Histogram of {title.lower()}: {count(counts_before.sum())} came in"
            + (f", {count(counts_after.sum())} were kept" if kept is not None else ""),
            counts_before, counts_after, edges, names, unit,
        )  # fmt: skip
        middle = f"median {brief(float(np.nanmedian(before)))}"
        if after is not None and np.isfinite(after).any():
            middle += f" before, {brief(float(np.nanmedian(after)))} after"
        found.append({"title": title, "svg": svg, "note": middle})
    return found


def _shorter_side(rows: Rows) -> np.ndarray | None:
    width, height = rows.numbers("width"), rows.numbers("height")
    return None if width is None or height is None else np.minimum(width, height)


def _aspect(rows: Rows) -> np.ndarray | None:
    width, height = rows.numbers("width"), rows.numbers("height")
    if width is None or height is None:
        return None
    return np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)


def _edges(values: np.ndarray) -> np.ndarray:
    """24 or fewer round bins up to the 99.5th percentile; what lies beyond is counted in the last."""
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    whole = bool((values == np.round(values)).all())
    high = high if high > low else float(values.max())
    step = charts.ticks(low, high, 20)
    size = max(step[1] - step[0], 1.0) if whole else step[1] - step[0]
    start = np.floor(low / size) * size
    return start + size * np.arange(int(np.ceil((high - start) / size + 1e-9)) + (1 if whole else 0) + 1)


def _counts(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    good = values[np.isfinite(values)]
    return np.histogram(np.clip(good, edges[0], np.nextafter(edges[-1], edges[0])), edges)[0]


def languages(rows: Rows, kept: Rows) -> list[dict[str, Any]]:
    """Rows a language: how many came in and how many were kept."""
    name = first_column(rows, LANGUAGE)
    if name is None:
        return []
    before = Counter(str(x) for x in rows.table[name].to_pylist() if x is not None)
    after = Counter(str(x) for x in kept.table[name].to_pylist() if x is not None)
    top = before.most_common(LANGUAGES)
    table = [{"name": lang, "in": n, "kept": after[lang], "share": 100 * n / sum(before.values())} for lang, n in top]
    rest = sum(before.values()) - sum(n for _, n in top)
    if rest:
        others = sum(after.values()) - sum(after[lang] for lang, _ in top)
        table.append({"name": "others", "in": rest, "kept": others, "share": 100 * rest / sum(before.values())})
    return table
