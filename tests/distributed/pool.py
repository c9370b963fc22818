"""Two teams of four real gloo processes that run functions for the tests; one pool a session.

`pool.run(function, size, *arguments)` runs `function(workers, *arguments)` on the first `size` processes of a team and
returns their results in order of rank. Smaller sizes are sub-groups of the team's world. `pool.run_all` keeps all
processes busy with many such jobs: those of different sub-groups run side by side, so that one computes while another
waits for a message.
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

from tests.end_to_end.clew import PATIENCE

TEAMS, SIZE = 2, 4
GROUPS = {1: [[0], [3], [1], [2]], 2: [[0, 1], [2, 3]], 3: [[0, 1, 2], [1, 2, 3]], 4: [[0, 1, 2, 3]]}  # by size
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
    os.nice(19)  # Ray runs its workers at 15, and eight busy neighbours would starve a Ray that is tested meanwhile
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE)
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
        stores = [os.path.join(tempfile.mkdtemp(), "store") for _ in range(TEAMS)]
        self.pipes: list[Connection] = []  # those of the first team, then those of the second
        self.processes = []
        for number in range(TEAMS * SIZE):
            ours, theirs = context.Pipe()
            place = number % SIZE, stores[number // SIZE], theirs
            process = context.Process(target=_serve, args=place, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], size: int, *arguments: Any, seconds: float = PATIENCE) -> list[Any]:
        (answers,) = self.run_all(function, [(size, arguments)], seconds)
        return answers

    def run_all(
        self, function: Callable[..., Any], jobs: Sequence[Job], seconds: float = PATIENCE
    ) -> Generator[list[Any]]:
        """The answers of each job, in the order of the jobs.

        Raises:
            AssertionError: a job failed on a worker.
        """
        counts = dict.fromkeys(GROUPS, 0)
        sent: list[list[Connection]] = []
        for size, arguments in jobs:
            turn, team = divmod(counts[size], TEAMS)
            ranks = GROUPS[size][turn % len(GROUPS[size])]
            counts[size] += 1
            sent.append([self.pipes[team * SIZE + rank] for rank in ranks])
            for pipe in sent[-1]:
                pipe.send((function, tuple(ranks), arguments))
        waiting = iter(sent)
        try:
            for pipes in waiting:
                answers = self._answers(pipes, seconds)
                for place, (right, value) in enumerate(answers):
                    if not right:
                        raise AssertionError(f"worker {place} of {len(pipes)} failed:\n{value}")
                yield [value for _, value in answers]
        finally:
            for pipes in waiting:  # whoever is next must find the pipes empty
                self._answers(pipes, seconds)

    def _answers(self, pipes: list[Connection], seconds: float) -> list[tuple[bool, Any]]:
        answers: list[tuple[bool, Any]] = []
        for place, pipe in enumerate(pipes):
            if not pipe.poll(seconds):
                failures = "\n".join(value for right, value in answers if not right)
                raise TimeoutError(f"worker {place} of {len(pipes)} did not answer; others failed with:\n{failures}")
            answers.append(pickle.loads(pipe.recv_bytes()))
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
