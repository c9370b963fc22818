"""What happened to every sample: the annotated table, the quarantine and the funnel."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from cl import storage
from cl.corpus import LANE_FIELD, QUARANTINE_SCHEMA
from cl.errors import DataError
from pipelines.plan import Plan, Step
from pipelines.run_steps import SECONDS, FragmentView
from pipelines.stages.base import GlobalStage
from pipelines.stages.keyed import KeyedStage
from pipelines.stages.locate import Locate
from pipelines.write import plain

STATUS = ("drop_stage", "drop_reason", "quarantined")


def annotated_file(plan: Plan, number: int) -> str:
    return storage.join(plan.out, "annotated", f"{number:05d}.parquet")


def annotate(plan: Plan, number: int) -> None:
    """Write `annotated/NNNNN.parquet`: every row of a fragment with all plain columns and what became of it.

    `drop_stage` and `drop_reason` are null for a kept row; `quarantined` rows have the quarantine's reason. Broken rows
    go to `quarantine/NNNNN.parquet` first.
    """
    view = FragmentView(plan, number)
    count = view.fragment.samples
    names = [name for name, node in plan.columns.items() if node is None and name != LANE_FIELD.name]
    view.preload(names)
    columns: dict[str, Any] = {name: view.base(name) for name in names}
    stage = np.full(count, None, dtype=object)
    reason = np.full(count, None, dtype=object)
    detail = np.full(count, None, dtype=object)
    for node in plan.nodes[:-1]:  # the last places what is kept
        seen = view.seen(node.number)
        for made in plan.made(node.number):
            if plain(made.type):
                columns[made.name] = _spread(view.made(node.number, made.name), seen, count)
        if node.stage.drops:
            for column, target in (("drop", reason), ("broken", detail)):
                values = np.array(view.made(node.number, column).to_pylist(), dtype=object)
                hit = np.array([value is not None for value in values], bool)
                target[seen[hit]] = values[hit]
                stage[seen[hit]] = node.name
                if column == "broken":
                    reason[seen[hit]] = node.stage.broken_reason
    broken = np.array([value is not None for value in detail], bool)
    columns["drop_stage"] = pa.array(stage, pa.string())
    columns["drop_reason"] = pa.array(reason, pa.string())
    columns["quarantined"] = pa.array(broken)
    table = pa.table(columns)
    if broken.any():
        part = table.filter(pa.array(broken))
        entries = {
            "shard": part["shard"],
            "key": part["key"],
            "stage": part["drop_stage"],
            "reason": part["drop_reason"],
            "detail": pa.array(detail[broken], pa.string()),
        }
        quarantine = pa.table(entries).cast(QUARANTINE_SCHEMA)
        storage.write_table(storage.join(plan.out, "quarantine", f"{number:05d}.parquet"), quarantine)
    storage.write_table(annotated_file(plan, number), table)


def _spread(values: pa.ChunkedArray, seen: np.ndarray, count: int) -> pa.ChunkedArray:
    """Values at positions `seen` of `count` rows, null elsewhere."""
    if len(seen) == count:
        return values
    index = np.full(count, -1, np.int64)
    index[seen] = np.arange(len(seen))
    return values.take(pa.array(index, mask=index < 0))


def build_funnel(plan: Plan) -> dict[str, Any]:
    """Count, over all annotated fragments, what each stage did.

    Raises:
        DataError: the counts do not add up.
    """
    outcomes: Counter[tuple[str | None, str | None, bool]] = Counter()
    total = 0
    for number in range(len(plan.corpus.fragments)):
        table = storage.read_table(annotated_file(plan, number), list(STATUS))
        total += table.num_rows
        counts = table.group_by(list(STATUS)).aggregate([([], "count_all")]).to_pylist()
        for row in counts:
            outcomes[row["drop_stage"], row["drop_reason"], row["quarantined"]] += row["count_all"]
    alive, stages = total, []
    for node in plan.nodes[:-1]:
        mine = {key[1:]: count for key, count in outcomes.items() if key[0] == node.name}
        dropped = {str(reason): count for (reason, broken), count in sorted(mine.items(), key=str) if not broken}
        broken = sum(count for (_, is_broken), count in mine.items() if is_broken)
        seconds = node_seconds(plan, node.number)
        if mine or not isinstance(node.stage, Locate):
            entry = {"stage": node.name, "in": alive, "dropped": dropped, "quarantined": broken}
            rate = round(alive / max(seconds, 1e-6), 1)
            stages.append(entry | {"seconds": round(seconds, 3), "rows_per_second": rate})
        alive -= sum(mine.values())
    kept = outcomes[None, None, False]
    quarantined = sum(count for (_, _, broken), count in outcomes.items() if broken)
    dropped_total = sum(outcomes.values()) - kept - quarantined
    if not total == plan.corpus.samples == kept + dropped_total + quarantined or alive != kept:
        raise DataError(
            f"Samples were lost: {plan.corpus.samples} went in, but {kept} kept + {dropped_total} dropped + "
            f"{quarantined} quarantined were found; delete {plan.out} and run again."
        )
    return {"in": total, "quarantined": quarantined, "dropped": dropped_total, "kept": kept, "stages": stages}


def node_seconds(plan: Plan, number: int) -> float:
    """Processor seconds that a node's steps took on all fragments, its reduction included."""
    node = plan.nodes[number]
    files = [plan.file(Step(number, "run"), fragment) for fragment in range(len(plan.corpus.fragments))]
    seconds = 0.0
    if isinstance(node.stage, (GlobalStage, KeyedStage)):
        done = storage.read_json(storage.join(plan.folder(number, "reduced"), "done.json"))
        seconds += float(done["seconds"])
        if done.get("frozen"):  # taken over: there are no partials
            return seconds + sum(map(_seconds, files))
        then = replace(plan, partitions=done.get("partitions", 1))  # how it was computed, perhaps in an earlier run
        files += [then.file(Step(number, "partial"), fragment) for fragment in range(len(plan.corpus.fragments))]
    return seconds + sum(map(_seconds, files))


def _seconds(url: str) -> float:
    with storage.open_parquet(url) as file:
        return float((file.schema_arrow.metadata or {}).get(SECONDS, b"0"))


def write_funnel(plan: Plan, funnel: dict[str, Any]) -> None:
    storage.write_bytes(storage.join(plan.out, "funnel.json"), orjson.dumps(funnel, option=orjson.OPT_INDENT_2) + b"\n")
