"""What the first worker decides for all."""

from __future__ import annotations

import torch
import torch.distributed as dist

from cl.engine.collectives import Workers
from cl.training.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from cl.training.config import Precision
from cl.training.precision import resolve


def agree_on_precision(choice: Precision, device: torch.device, workers: Workers) -> Precision:
    """What the first worker makes of `auto`: machines of one run may differ."""
    chosen = [resolve(choice, device)]
    if workers.size > 1:
        dist.broadcast_object_list(chosen, group=workers.group, device=device, group_src=0)
    return chosen[0]


def agree_on_checkpoint(root: str, device: torch.device, workers: Workers) -> Checkpoint | None:
    """The newest whole checkpoint that the first worker finds, or None."""
    found = newest_checkpoint(root) if workers.rank == 0 else None
    if workers.size == 1:
        return found
    step = [found.step if found else None]
    dist.broadcast_object_list(step, group=workers.group, device=device, group_src=0)
    if step[0] is None or workers.rank == 0:
        return found
    return open_checkpoint(root, step[0])
