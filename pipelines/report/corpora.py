"""The sections on corpora: what was ingested, and what curation kept, dropped and why."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cl import storage
from cl.errors import DataError
from pipelines.report.annotated import Rows, first_column, load_rows, text_of
from pipelines.report.distributions import distributions, languages
from pipelines.report.pictures import Picture, Thumbnails
from pipelines.report.runs import Run, absolute
from pipelines.report.wording import brief, clean, count, number, words

EXAMPLES = 8  # pictures a drop reason, and a cluster
PAIRS = 6  # near-duplicates shown beside what they duplicate
CLUSTERS = 4  # largest, and as many smallest
QUARANTINE_ROWS = 50

# The columns that stages write, by what the page does with them; the first that is there is used.
CLUSTER = ("cluster", "cluster_id")
DUPLICATE = "duplicate_of"  # how the names of columns end that hold the id of what a row duplicates
# Not shown as "values": they say the same for every row, or are shown elsewhere.
HIDDEN = {
    "id", "source", "key", "shard", "content", "meta", "offset", "length", "text", "anchor", "positive", "lane",
    "drop_stage", "drop_reason", "quarantined", "phash", "width", "height", "format", "aspect",
}  # fmt: skip


def corpus_section(run: Run, pictures: Thumbnails) -> dict[str, Any]:
    """What the page shows of an ingested corpus."""
    manifest = run.json("corpus.json")
    rows = load_rows(run, "samples")
    section: dict[str, Any] = {
        "facts": _facts(manifest),
        "quarantine": quarantine(run),
        "charts": [],
        "examples": [],
        "texts": [],
        "sources": [],
        "sampled": "",
    }
    if rows is not None and rows.table.num_rows:
        section["charts"] = distributions(rows, None)
        some = rows.by_id(2 * EXAMPLES)
        if rows.has("offset"):
            section["examples"] = [_picture(pictures, [run.path], row) for row in some]
        else:
            section["texts"] = [_text_example(row) for row in some[:EXAMPLES]]
        section["sources"] = Counter(map(str, rows.table["source"].to_pylist())).most_common(10)
        section["sampled"] = _sampled(rows)
    return section


def curation_section(run: Run, pictures: Thumbnails) -> dict[str, Any]:
    """What the page shows of a curation run."""
    funnel = run.json("funnel.json")
    roots = [*_input_corpora(run), run.path]
    section: dict[str, Any] = {
        "facts": _facts(run.json("corpus.json")),
        "funnel": funnel_steps(funnel),
        "quarantine": quarantine(run),
        "charts": [],
        "languages": [],
        "drops": [],
        "clusters": [],
        "sampled": "",
    }
    rows = load_rows(run, "annotated")
    if rows is None:
        run.note("The annotated table is missing, so there are no examples and no histograms.")
        return section
    kept = rows.where(pc.is_null(rows.table["drop_reason"])) if rows.has("drop_reason") else rows
    section["sampled"] = _sampled(rows)
    section["charts"] = distributions(rows, kept)
    section["languages"] = languages(rows, kept)
    order = [str(stage.get("stage")) for stage in funnel.get("stages", [])]
    section["drops"] = drops(rows, roots, pictures, order)
    section["clusters"] = clusters(kept, roots, pictures)
    return section


def _input_corpora(run: Run) -> list[str]:
    """Where the rows' relative shard paths start: the corpora that the run read."""
    value = run.config.get("corpus", run.config.get("corpora", []))
    values = value if isinstance(value, list) else [value]
    paths = [each.get("path") if isinstance(each, dict) else each for each in values]
    return [absolute(str(path)) for path in paths if path]


def _facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    if not manifest:
        return []
    fragments = manifest.get("fragments", [])
    facts = [("kind", str(manifest.get("kind"))), ("samples", count(manifest.get("samples")))]
    facts += [("quarantined", count(manifest.get("quarantined", 0))), ("fragments", count(len(fragments)))]
    if manifest.get("lanes"):
        facts.append(("lanes", count(manifest["lanes"])))
    return facts


def _sampled(rows: Rows) -> str:
    if not rows.sampled:
        return ""
    part = f"{count(rows.table.num_rows)} of the {count(rows.total)} rows"
    return f"Examples and histograms are of {part}; counts are of all."


def funnel_steps(funnel: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages with what entered, what each reason took away, and the share of the first that is left."""
    first = int(funnel.get("in") or 0)
    steps = []
    for stage in funnel.get("stages", []):
        dropped = {str(k): int(v) for k, v in (stage.get("dropped") or {}).items() if v}
        if stage.get("quarantined"):
            dropped["quarantined"] = int(stage["quarantined"])
        came = int(stage.get("in") or 0)
        left = came - sum(dropped.values())
        steps.append(
            {
                "stage": words(stage.get("stage", "")),
                "in": came,
                "left": left,
                "dropped": sorted(dropped.items(), key=lambda item: -item[1]),
                "total": sum(dropped.values()),
                "left_share": 100 * left / first if first else 0.0,
                "drop_share": 100 * sum(dropped.values()) / first if first else 0.0,
                "rate": number(stage.get("rows_per_second")),
                "seconds": number(stage.get("seconds"), 2),
            }
        )
    return steps


def quarantine(run: Run) -> dict[str, Any]:
    """The quarantine table's first rows and its counts by reason."""
    shown: list[dict[str, str]] = []
    reasons: Counter[tuple[str, str]] = Counter()
    for name in storage.list_files(run.url("quarantine"), ".parquet"):
        try:
            table = storage.read_table(run.url("quarantine", name))
        except DataError as error:
            run.note(str(error))
            continue
        for row in table.to_pylist():
            reasons[(str(row.get("stage")), str(row.get("reason")))] += 1
            if len(shown) < QUARANTINE_ROWS:
                shown.append(
                    {
                        "shard": clean(str(row.get("shard") or "").rsplit("/", 1)[-1], 60),
                        "key": clean(row.get("key") or "-", 60),
                        "stage": words(row.get("stage")),
                        "reason": words(clean(row.get("reason"), 80)),
                        "detail": clean(row.get("detail") or "", 160),
                    }
                )
    return {"rows": shown, "total": sum(reasons.values()), "reasons": reasons.most_common()}


def drops(rows: Rows, roots: list[str], pictures: Thumbnails, order: list[str]) -> list[dict[str, Any]]:
    """Examples of every reason for which rows were dropped, by stage, the most frequent first."""
    if not rows.has("drop_reason"):
        return []
    table = rows.table
    if rows.has("quarantined"):  # those are in a table of their own
        table = table.filter(pc.invert(pc.fill_null(table["quarantined"], False)))
    dropped = Rows(table, table.num_rows)
    groups = (
        table.filter(pc.is_valid(table["drop_reason"]))
        .group_by(["drop_stage", "drop_reason"])
        .aggregate([([], "count_all")])
    )
    found = []
    place = {stage: k for k, stage in enumerate(order)}
    for group in sorted(groups.to_pylist(), key=lambda g: (place.get(g["drop_stage"], len(place)), -g["count_all"])):
        mask = pc.and_(
            pc.equal(table["drop_stage"], group["drop_stage"]), pc.equal(table["drop_reason"], group["drop_reason"])
        )
        examples = dropped.where(mask).by_id(EXAMPLES)
        found.append(
            {
                "stage": words(group["drop_stage"]),
                "reason": words(clean(group["drop_reason"], 80)),
                "count": group["count_all"],
                **_examples(rows, examples, roots, pictures),
            }
        )
    return found


def _examples(rows: Rows, examples: list[dict[str, Any]], roots: list[str], pictures: Thumbnails) -> dict[str, Any]:
    """Dropped rows as pairs with what they duplicate, as pictures, or as texts."""
    column = next((n for row in examples for n in row if n.endswith(DUPLICATE) and row[n]), None)
    twins = rows.find({str(row[column]) for row in examples if row.get(column)}) if column else {}
    pairs: list[tuple[Any, Any]] = []
    singles: list[Any] = []
    for row in examples:
        twin = twins.get(str(row.get(column))) if column else None
        if twin is not None and twin["id"] != row["id"]:
            if len(pairs) < PAIRS:
                pairs.append((_example(row, roots, pictures), _example(twin, roots, pictures, kept=True)))
        else:
            singles.append(_example(row, roots, pictures))
    return {"pairs": pairs, "pictures": singles, "with_images": rows.has("offset")}


def _example(row: dict[str, Any], roots: list[str], pictures: Thumbnails, kept: bool = False) -> Any:
    if row.get("offset") is None:
        return _text_example(row) | {"kept": kept}
    return _picture(pictures, roots, row, () if kept else decided_by(row))


def _text_example(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "anchor": clean(row.get("anchor", "")),
        "positive": clean(row.get("positive", "")),
        "key": clean(row.get("key"), 60),
        "values": decided_by(row),
    }


def decided_by(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The values behind a drop: the columns named after its stage, or else those that share a word with its reason."""
    reason, stage = str(row.get("drop_reason") or "").lower(), str(row.get("drop_stage") or "").lower()
    if not reason:
        return ()
    values = []
    if {"size", "small", "aspect", "large", "side"} & set(reason.split("_")) and row.get("width"):
        values.append(("size", f"{row['width']} × {row['height']}"))
        values.append(("aspect", brief(max(row["width"], row["height"]) / max(1, min(row["width"], row["height"])))))
    named = [n for n in row if n not in HIDDEN and not n.endswith(DUPLICATE) and row[n] is not None]
    related = [n for n in named if stage and n.startswith(stage)] or [n for n in named if _related(n, reason)]
    values += [(words(n.removeprefix(f"{stage}_").removeprefix("text_")), _value(row[n])) for n in related]
    return tuple(values[:4])


def _related(column: str, name: str) -> bool:
    """Whether a column and a reason share a word by its first four letters: text_chars and too_few_characters."""
    stems = {part[:4] for part in name.split("_")} - {"text", "imag", "dupl", "too", "few", "many"}
    return any(part[:4] in stems for part in column.lower().split("_"))


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return brief(value) if isinstance(value, (int, float)) else clean(value, 40)


def _picture(pictures: Thumbnails, roots: list[str], row: dict[str, Any], values: Any = ()) -> Picture:
    caption = clean(text_of(row), 120)
    return pictures.of_sample(
        roots,
        row,
        alt=caption or f"sample {row.get('key')}",
        caption=caption,
        key=clean(row.get("key"), 60),
        values=values,
    )


def clusters(kept: Rows, roots: list[str], pictures: Thumbnails) -> list[dict[str, Any]]:
    """A row of examples for each of the largest and smallest clusters of what was kept."""
    name = first_column(kept, CLUSTER)
    if name is None:
        return []
    known = kept.where(pc.is_valid(kept.table[name]))
    sizes = Counter(known.table[name].to_pylist()).most_common()
    chosen = [(c, n, "largest") for c, n in sizes[:CLUSTERS]]
    chosen += [(c, n, "smallest") for c, n in sizes[max(CLUSTERS, len(sizes) - CLUSTERS) :]]
    found = []
    for cluster, size, end in chosen:
        mask = pc.equal(known.table[name], pa.scalar(cluster, known.table[name].type))
        rows = known.where(mask).by_id(EXAMPLES)
        found.append(
            {
                "name": str(cluster),
                "size": size,
                "end": end,
                "of": len(sizes),
                "pictures": [_example(row, roots, pictures) for row in rows],
                "with_images": kept.has("offset"),
            }
        )
    return found
