"""Run a plan on Ray: passes over the fragments through Ray Data, reductions between them as tasks.

What is there is not done again, so the same call resumes a killed run. Items that go through Ray are fragment numbers;
data goes through the node files, which makes every task idempotent and lets Ray retry it at will.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa

from cl import errors, storage
from cl.errors import ClewError, DataError, user_error
from cl.progress import progress
from pipelines.plan import Plan, Step, pools, segments
from pipelines.ray_data import prepare_ray_data
from pipelines.rounds import on_ray, run_rounds
from pipelines.run_steps import NodeColumns, run_steps
from pipelines.stages.base import Context, GlobalStage
from pipelines.stages.keyed import KeyedStage

BLOCKS_A_CORE = 8  # of a pass: enough to even out the load, few enough for Ray Data's cost of some 20 ms a block

# An extra action on each fragment at the end of a pass: the files it makes, by fragment, and how.
Extra = tuple[Callable[[int], str], Callable[[int], None]]


def execute(plan: Plan, extras: dict[int, list[Extra]], start: int = 0, stop: int | None = None) -> None:
    """Do the segments from `start` to `stop`, and the reductions that follow them, as far as they are missing.

    Args:
        extras: number of a segment -> what else its pass does on each fragment, after its steps.
    """
    for number, steps in list(enumerate(segments(plan)))[start:stop]:
        done = steps[-1].action == "partial" and plan.reduced(steps[-1].node)
        run_pass(plan, steps[:-1] if done else steps, extras.get(number, []))
        own, joined = len(plan.corpus.fragments), plan.fragments_for(steps[-1].node)
        if steps[-1].action == "partial" and not done and joined > own:
            run_pass(plan, steps[-1:], numbers=range(own, joined))
        if steps[-1].action == "partial" and number + 1 != stop:
            reduce_node(plan, steps[-1].node)


def pending(plan: Plan, steps: Sequence[Step], extras: Sequence[Extra], numbers: range) -> list[int]:
    """Fragments of which a step's or an extra's file is missing."""
    there = {}
    for step in steps:
        folder = plan.step_folder(step)
        storage.sweep_temporary(folder)
        there[step] = set(storage.list_files(folder, ".parquet"))
    missing = []
    for number in numbers:
        name = f"{number:05d}.parquet"
        if any(name not in names for names in there.values()) or any(
            not storage.exists(file(number)) for file, _ in extras
        ):
            missing.append(number)
    return missing


class _Tasks:
    """Steps and extras on a fragment; one instance a worker, so that models are opened once."""

    def __init__(self, plan: Plan, steps: Sequence[Step], extras: Sequence[Extra]) -> None:
        self.plan, self.steps, self.extras = plan, steps, extras
        self.opened: dict[int, Any] = {}

    def __call__(self, number: int) -> None:
        run_steps(self.plan, self.steps, number, self.opened)
        for file, make in self.extras:
            if not storage.exists(file(number)):
                make(number)


def run_pass(plan: Plan, steps: Sequence[Step], extras: Sequence[Extra] = (), numbers: range | None = None) -> None:
    """One pass over the fragments; stages with a model run in actors, fed by the tasks before them as these finish.

    Args:
        numbers: of the fragments; None: those of the corpus.
    """
    missing = pending(plan, steps, extras, range(len(plan.corpus.fragments)) if numbers is None else numbers)
    if not missing:
        return
    groups = pools(plan, steps) or [((0, 1.0, 0.0), [])]
    if extras and groups[-1][0][0]:
        groups.append(((0, 1.0, 0.0), []))
    names = list(dict.fromkeys(plan.nodes[step.node].name for step in steps))
    sizes = {number: _samples(plan, number) for number in missing}
    with progress(_title(names), total=sum(sizes.values()), unit="samples") as bar, user_errors():
        stream = fragments_through_ray(
            missing,
            [
                (pool, _Tasks, (plan, group, extras if index == len(groups) - 1 else ()))
                for index, (pool, group) in enumerate(groups)
            ],
        )
        for number in stream:
            bar.advance(sizes[number])


def _samples(plan: Plan, number: int) -> int:
    owner, own = plan.home(number)
    return owner.corpus.fragments[own].samples


def _title(names: Sequence[str]) -> str:
    words = [name.replace("_", " ") for name in names]
    text = ", ".join(words) if len(words) <= 3 else f"{words[0]}, {words[1]} ... {words[-1]}"
    return (text or "collect").capitalize()


def fragments_through_ray(
    numbers: Sequence[int],
    operators: Sequence[tuple[tuple[int, float, float], type, tuple[Any, ...]]],
) -> Iterator[int]:
    """Send numbers through a chain of callables over Ray Data and yield each when it has passed them all.

    Args:
        operators: ((actors, CPUs, GPUs), class, its arguments); an instance is called with one number at a time, in
            tasks if there are 0 actors.

    Raises:
        ClewError: the first that a callable raised.
    """
    import ray
    import ray.data

    prepare_ray_data()
    cores = max(int(ray.cluster_resources().get("CPU", 1)), 1)
    blocks = min(len(numbers), BLOCKS_A_CORE * cores)
    items = [{"fragment": number, "error": ""} for number in numbers]
    data: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=blocks)
    for (actors, cpus, gpus), kind, arguments in operators:
        if actors:
            data = data.map_batches(
                _Guarded,
                fn_constructor_args=(kind, arguments),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=cpus,
                num_gpus=gpus or None,
            )
        else:
            data = data.map_batches(_as_function(_Guarded(kind, arguments)), batch_size=1, num_cpus=cpus)
    for row in data.iter_rows():
        if row["error"]:
            name, text = row["error"].split(":", 1)
            raise getattr(errors, name, ClewError)(text)
        yield int(row["fragment"])


class _Guarded:
    """Calls an instance of a class with each number that arrives without an error.

    An error meant for the user travels on as data: Ray Data's own exceptions lose their cause on the way to the driver.
    """

    def __init__(self, kind: type, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments = kind, arguments
        self.each: Callable[[int], None] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = []
        for number, error in zip(batch["fragment"], batch["error"], strict=True):
            text = str(error)
            if not text:
                try:
                    self.each = self.each or self.kind(*self.arguments)
                    self.each(int(number))
                except ClewError as refused:
                    text = f"{type(refused).__name__}:{refused}"
            found.append(text)
        return {"fragment": batch["fragment"], "error": np.array(found, dtype=object)}


def _as_function(each: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Ray Data runs plain functions in tasks and would take a callable object for an actor's class."""

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        return each(batch)

    return call


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Raise the sentence meant for the user in place of what Ray wraps around it."""
    try:
        yield
    except ClewError:
        raise
    except Exception as error:
        cause = user_error(error)
        if cause is None:
            raise
        raise cause from None


class _Partials(Sequence[pa.Table]):
    """A node's partials by fragment, each read when it is asked for: a reduction that goes through them holds one."""

    def __init__(self, plan: Plan, node: int) -> None:
        self.plan, self.step = plan, Step(node, "partial")

    def __len__(self) -> int:
        return len(self.plan.corpus.fragments)

    @overload
    def __getitem__(self, fragment: int) -> pa.Table: ...
    @overload
    def __getitem__(self, fragment: slice) -> list[pa.Table]: ...
    def __getitem__(self, fragment: int | slice) -> pa.Table | list[pa.Table]:
        if isinstance(fragment, slice):
            return [self[each] for each in range(len(self))[fragment]]
        if not 0 <= fragment < len(self):
            raise IndexError(fragment)
        return storage.read_table(self.plan.file(self.step, fragment)).replace_schema_metadata(None)


def reduce_partials(plan: Plan, number: int) -> None:
    """Reduce a node's partials and write `reduced/`, `done.json` last."""
    stage = plan.nodes[number].stage
    assert isinstance(stage, GlobalStage)
    start = time.perf_counter()
    fragments = range(len(plan.corpus.fragments))
    result = stage.reduce(
        _Partials(plan, number),
        Context(NodeColumns(plan, number), plan.corpus.kind, plan.seed, len(fragments)),
    )
    folder = plan.folder(number, "reduced")
    if isinstance(result, pa.Table):
        storage.write_table(storage.join(folder, "all.parquet"), result)
    else:
        if len(result) != len(fragments):
            raise DataError(
                f"Stage {plan.nodes[number].name!r} reduced to {len(result)} tables for {len(fragments)} fragments."
            )
        for fragment, table in enumerate(result):
            storage.write_table(storage.join(folder, f"{fragment:05d}.parquet"), table)
    seconds = time.perf_counter() - start
    done = {"shared": isinstance(result, pa.Table), "seconds": round(seconds, 6)}
    storage.write_json(storage.join(folder, "done.json"), done)


def reduce_node(plan: Plan, number: int) -> None:
    """Reduce a global stage's partials, in one task or in the rounds of a keyed stage, unless that is done.

    Raises:
        ClewError: what the reduction raised for the user.
    """
    if plan.reduced(number):
        return
    import ray

    storage.sweep_temporary(plan.folder(number, "reduced"))
    node = plan.nodes[number]
    with progress(f"Reducing {node.name.replace('_', ' ')}", total=1, unit="steps") as bar, user_errors():
        if isinstance(node.stage, KeyedStage):
            run_rounds(plan, number, on_ray(plan, number))
        else:
            ray.get(ray.remote(num_cpus=1, max_retries=3)(reduce_partials).remote(plan, number))
        bar.advance(1)
