"""Eight real gloo processes that run functions for the tests, at most four of them together; one pool a session.

`pool.run(function, size, *arguments)` runs `function(workers, *arguments)` on the first `size` processes and returns
their results in order of rank. Smaller sizes are sub-groups of the same world. `pool.run_all` keeps all processes busy
with many such jobs: those of different sub-groups run side by side, so that one computes while another waits for a
message.
"""

from __future__ import annotations

import io
import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PROCESSES = 8
GROUPS = {  # by size
    1: [[0], [3], [7], [4], [1], [2], [5], [6]],
    2: [[0, 1], [6, 7], [2, 3], [4, 5]],
    3: [[0, 1, 2], [5, 6, 7], [1, 2, 3], [4, 5, 6]],
    4: [[0, 1, 2, 3], [4, 5, 6, 7]],
}
Job = tuple[int, tuple[Any, ...]]  # size, arguments


class _Pickler(pickle.Pickler):
    """Tensors as arrays: multiprocessing would pass each through shared memory, torch as a whole archive."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.detach().numpy(),)
        return NotImplemented


def _serve(rank: int, store: str, pipe: Connection) -> None:
    from cl.engine.collectives import Workers

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
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
        packed = io.BytesIO()
        _Pickler(packed).dump(answer)
        pipe.send_bytes(packed.getvalue())
    dist.destroy_process_group()


class Pool:
    def __init__(self) -> None:
        context = mp.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(PROCESSES):
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
