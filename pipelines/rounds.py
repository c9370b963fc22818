"""The rounds of a keyed stage (`pipelines.stages.keyed`), each task with its own files, done once and resumable.

A stream is deleted as soon as no round to come reads it, so the disk holds about what two rounds exchange. A run that
goes on begins behind the last round whose files are all there. The commit is the node's `reduced/done.json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cl import storage
from pipelines.plan import Plan
from pipelines.run_steps import NodeColumns
from pipelines.shuffle import count_routed
from pipelines.stages.keyed import GROUPS, Inbox, KeyedStage, Round, group_of_fragments
from pipelines.streams import read_stream, read_written, stream_file, stream_folder, stream_name, write_streams

# Runs tasks (round, iteration, task) anywhere and yields the seconds that each took, in any order.
Runner = Callable[[Sequence[tuple[int, int, int]]], Iterator[float]]


def run_task(plan: Plan, node: int, number: int, iteration: int, task: int) -> float:
    """Do one task of a round unless it is done; returns the seconds it took.

    A round that repeats reads its streams of this iteration and writes those of the next.
    """
    stage = plan.nodes[node].stage
    assert isinstance(stage, KeyedStage)
    each = stage.rounds()[number]
    after = iteration + 1 if each.repeats else 0
    if all(storage.exists(stream_file(plan, node, name, after, task)) for name in each.writes):
        return 0.0
    start = time.perf_counter()
    streams = {}
    for name in each.reads if iteration == 0 else each.repeats:
        table = read_stream(plan, node, name, task, iteration)
        if table is not None:
            streams[name] = table
    columns = NodeColumns(plan, node)
    fragments = range(0)
    if each.over != "partitions":
        fragments = range(task, task + 1)
    if each.over == "groups":
        fragments = group_of_fragments(task, plan.fragments_for(node))
    inbox = Inbox(
        task,
        streams,
        plan.partitions,
        columns,
        plan.corpus.kind,
        plan.seed,
        plan.fragments_for(node),
        lambda stream, writer: read_written(plan, node, stream, writer),
        fragments,
        len(plan.corpus.fragments),
    )
    write_streams(plan, node, each.run(inbox), each.writes, (after, task))
    return time.perf_counter() - start


def run_rounds(plan: Plan, node: int, runner: Runner) -> None:
    """Do all rounds of a keyed node that are missing, and commit."""
    stage = plan.nodes[node].stage
    assert isinstance(stage, KeyedStage)
    seconds = 0.0
    rounds = stage.rounds()
    done = [number for number, each in enumerate(rounds) if _complete(plan, node, each)]
    for number in range(max(done, default=-1) + 1, len(rounds)):
        each = rounds[number]
        tasks = _tasks(plan, node, each)
        for stream in each.writes:
            storage.sweep_temporary(stream_folder(plan, node, stream))
        iteration = 0
        while True:
            seconds += sum(runner([(number, iteration, task) for task in tasks]))
            iteration += 1
            if not each.repeats or _silent(plan, node, each, iteration, tasks):
                break
        still = {name for later in rounds[number + 1 :] for name in later.reads}
        _delete(plan, node, set(each.reads) - still - {stage.result})
    storage.write_json(
        storage.join(plan.folder(node, "reduced"), "done.json"),
        {"partitions": plan.partitions, "seconds": round(seconds, 6)},
    )
    _delete(plan, node, {*stage.sends, *(name for each in rounds for name in each.writes)} - {stage.result})


def _tasks(plan: Plan, node: int, each: Round) -> range:
    fragments = plan.fragments_for(node)
    return range({"partitions": plan.partitions, "fragments": fragments, "groups": min(fragments, GROUPS)}[each.over])


def _complete(plan: Plan, node: int, each: Round) -> bool:
    """Whether all that a round writes is there; one that repeats is looked at task by task."""
    tasks = _tasks(plan, node, each)
    names = {stream_name(0, task) for task in tasks}
    return not each.repeats and all(
        names <= set(storage.list_files(stream_folder(plan, node, name), ".arrow")) for name in each.writes
    )


def _delete(plan: Plan, node: int, streams: Iterable[str]) -> None:
    for stream in streams:
        fs, path = storage.open_fs(stream_folder(plan, node, stream))
        if fs.exists(path):
            fs.rm(path, recursive=True)


def _silent(plan: Plan, node: int, each: Round, iteration: int, tasks: Iterable[int]) -> bool:
    """Whether a round that repeats has left nothing to do."""
    files = (stream_file(plan, node, name, iteration, task) for name in each.repeats for task in tasks)
    return not any(count_routed(file) for file in files)


def here(plan: Plan, node: int) -> Runner:
    """A runner that does everything in this process."""
    return lambda tasks: (run_task(plan, node, *task) for task in tasks)


def on_ray(plan: Plan, node: int) -> Runner:
    """A runner on Ray's workers; a task that dies with its worker is done again."""
    import ray

    shared: Any = ray.put(plan)
    remote = ray.remote(num_cpus=1, max_retries=3)(run_task)

    def run(tasks: Sequence[tuple[int, int, int]]) -> Iterator[float]:
        waiting = [remote.remote(shared, node, *task) for task in tasks]
        while waiting:
            ready, waiting = ray.wait(waiting)
            yield from ray.get(ready)

    return run
