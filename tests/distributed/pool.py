"""Four real gloo processes that run functions for the tests; one pool a session.

`pool.run(function, size, *arguments)` runs `function(workers, *arguments)` on the first `size` processes and returns
their results in order of rank. Smaller sizes are sub-groups of the same world. `pool.run_all` keeps all processes busy
with many such jobs: those of different sub-groups run side by side.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor

LARGEST = 4
GROUPS = {1: [[0], [3], [1], [2]], 2: [[0, 1], [2, 3]], 3: [[0, 1, 2], [1, 2, 3]], 4: [[0, 1, 2, 3]]}  # by size
Job = tuple[int, tuple[Any, ...]]  # size, arguments


def _serve(rank: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from cl.engine.collectives import Workers

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=LARGEST)
    groups: dict[tuple[int, ...], Any] = {
        tuple(ranks): dist.new_group(ranks) for several in GROUPS.values() for ranks in several
    }
    while (task := pipe.recv()) is not None:
        function, ranks, arguments = task
        try:
            workers = Workers.current(groups[ranks], averaged_by=len(ranks))
            answer = True, function(workers, *arguments)
        except Exception:
            answer = False, traceback.format_exc()
        # Plain pickle: multiprocessing's own would pass every tensor through shared memory, a file descriptor each.
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class Pool:
    def __init__(self) -> None:
        context = mp.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(LARGEST):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], size: int, *arguments: Any, seconds: float = 120) -> list[Any]:
        (answers,) = self.run_all(function, [(size, arguments)], seconds)
        return answers

    def run_all(self, function: Callable[..., Any], jobs: Sequence[Job], seconds: float = 120) -> Generator[list[Any]]:
        """The answers of each job, in the order of the jobs.

        Raises:
            AssertionError: a job failed on a worker.
        """
        counts = dict.fromkeys(GROUPS, 0)
        sent: list[list[int]] = []
        for size, arguments in jobs:
            ranks = GROUPS[size][counts[size] % len(GROUPS[size])]
            counts[size] += 1
            sent.append(ranks)
            for rank in ranks:
                self.pipes[rank].send((function, tuple(ranks), arguments))
        waiting = iter(sent)
        try:
            for ranks in waiting:
                answers = self._answers(ranks, seconds)
                for place, (right, value) in enumerate(answers):
                    if not right:
                        raise AssertionError(f"worker {place} of {len(ranks)} failed:\n{value}")
                yield [value for _, value in answers]
        finally:
            for ranks in waiting:  # whoever is next must find the pipes empty
                self._answers(ranks, seconds)

    def _answers(self, ranks: list[int], seconds: float) -> list[tuple[bool, Any]]:
        answers: list[tuple[bool, Any]] = []
        for place, rank in enumerate(ranks):
            if not self.pipes[rank].poll(seconds):
                failures = "\n".join(value for right, value in answers if not right)
                raise TimeoutError(f"worker {place} of {len(ranks)} did not answer; others failed with:\n{failures}")
            answers.append(pickle.loads(self.pipes[rank].recv_bytes()))
        return answers

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            process.kill()


def gradient(leaf: Any) -> Tensor:
    """The gradient that a backward pass left on a leaf or parameter."""
    assert isinstance(leaf, Tensor)
    assert leaf.grad is not None
    return leaf.grad
