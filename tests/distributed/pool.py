"""Four real gloo processes that run functions for the tests; one pool a session.

`pool.run(function, size, *arguments)` runs `function(workers, *arguments)` on the first `size` processes and returns
their results in order of rank. Smaller sizes are sub-groups of the same world.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from torch import Tensor

LARGEST = 4


def _serve(rank: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from cl.engine.collectives import Workers

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=LARGEST)
    groups: dict[int, Any] = {size: dist.new_group(list(range(size))) for size in range(1, LARGEST + 1)}
    while (task := pipe.recv()) is not None:
        function, size, arguments = task
        try:
            workers = Workers.current(groups[size], averaged_by=size)
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
        for pipe in self.pipes[:size]:
            pipe.send((function, size, arguments))
        answers = []
        for rank, pipe in enumerate(self.pipes[:size]):
            if not pipe.poll(seconds):
                raise TimeoutError(f"worker {rank} of {size} did not answer")
            answers.append(pickle.loads(pipe.recv_bytes()))
        for rank, (right, value) in enumerate(answers):
            if not right:
                raise AssertionError(f"worker {rank} of {size} failed:\n{value}")
        return [value for _, value in answers]

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
