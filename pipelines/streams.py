"""Where the streams of a keyed stage lie, and how its tasks write and read them.

    OUT/.nodes/<key>/shuffle-<P>/<stream>/<iteration>-<task>.arrow

P, the number of partitions, is part of the folder and not of the key: it changes no result.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from cl import storage
from pipelines.plan import Plan
from pipelines.shuffle import read_routed, read_whole, write_routed
from pipelines.stages.keyed import KeyedStage, Streams


def stream_folder(plan: Plan, node: int, stream: str, partitions: int | None = None) -> str:
    return storage.join(plan.folder(node, f"shuffle-{partitions or plan.partitions}"), stream)


def stream_name(iteration: int, task: int) -> str:
    return f"{iteration:05d}-{task:05d}.arrow"


def stream_file(plan: Plan, node: int, stream: str, iteration: int, task: int) -> str:
    return storage.join(stream_folder(plan, node, stream), stream_name(iteration, task))


def write_streams(plan: Plan, node: int, streams: Streams, promised: Sequence[str], files: tuple[int, int]) -> None:
    """Write what a task sends; `files` is its iteration and number."""
    assert set(streams) == set(promised), f"{plan.nodes[node].name} sends {sorted(streams)}, not {sorted(promised)}"
    for name in promised:
        write_routed(stream_file(plan, node, name, *files), streams[name])


def read_stream(
    plan: Plan, node: int, stream: str, destination: int, iteration: int | None, partitions: int | None = None
) -> pa.Table | None:
    """What was sent to a destination in one iteration, or in all of them (None); None if nobody has written."""
    folder = stream_folder(plan, node, stream, partitions)
    names = storage.list_files(folder, ".arrow")
    if iteration is not None:
        names = [name for name in names if name.startswith(f"{iteration:05d}-")]
    return read_routed([storage.join(folder, name) for name in names], destination) if names else None


def read_written(plan: Plan, node: int, stream: str, task: int) -> pa.Table:
    """All that one task of a round that does not repeat wrote to a stream, for whomever."""
    return read_whole(stream_file(plan, node, stream, 0, task))


def read_result(plan: Plan, node: int, fragment: int, partitions: int) -> pa.Table:
    """What the rounds sent to a fragment."""
    stage = plan.nodes[node].stage
    assert isinstance(stage, KeyedStage)
    table = read_stream(plan, node, stage.result, fragment, None, partitions)
    assert table is not None
    return table
