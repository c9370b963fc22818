"""Chooses how candidates of other workers are seen, from sizes and free memory."""

from __future__ import annotations

from typing import Literal

import psutil
import torch
import torch.distributed as dist

from cl.engine.collectives import Workers
from cl.engine.sweep import Exchange

ExchangeChoice = Literal["auto", "gather", "ring", "local"]

GATHERED_SHARE = 0.25  # of the free memory may go to gathered candidates and their gradient


class Exchanger:
    """Decides between exchange modes, once for every size of batch.

    `auto` gathers where all candidates and their float32 gradient fit easily on every worker, and circulates them
    (`ring`) where they do not: gathering is one collective each way, the ring holds two blocks of one worker's size.
    """

    def __init__(self, choice: ExchangeChoice) -> None:
        self.choice = choice
        self._chosen: dict[tuple[int, int], Exchange] = {}

    def __call__(self, rows: int, width: int, element: int, workers: Workers) -> Exchange:
        """The mode for this batch. All workers call this together and get the same answer.

        Args:
            rows: candidates of all workers.
            width: numbers of one candidate (dimensions; tokens x dimensions).
            element: bytes of one number.
            workers: those that share candidates; they compare their free memory.
        """
        if self.choice != "auto":
            return self.choice
        if workers.size == 1:
            return "gather"
        sizes = rows, width
        if sizes not in self._chosen:
            nccl = dist.get_backend(workers.group) == "nccl"
            free = torch.tensor(_free_bytes(workers, nccl), dtype=torch.float64, device="cuda" if nccl else "cpu")
            least = float(workers.all_reduce(free, dist.ReduceOp.MIN))
            self._chosen[sizes] = "gather" if rows * width * (element + 4) <= GATHERED_SHARE * least else "ring"
        return self._chosen[sizes]


def _free_bytes(workers: Workers, on_gpu: bool) -> int:
    """Memory that this worker can still take: of its GPU, or its share of the machine's."""
    if on_gpu:
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available // workers.size
