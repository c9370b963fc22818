"""Where a worker is: its device, its rank, and the process group it belongs to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def own_device() -> torch.device:
    """The GPU of this worker, or the CPU. Ray Train shows each worker its own GPU first."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    from ray.train import torch as ray_torch

    device = ray_torch.get_device() if not under_torchrun() and dist.is_initialized() else None
    if device is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def torchrun_group(timeout_seconds: int) -> Iterator[None]:
    """The process group of a torchrun worker for the length of the block; `timeout_seconds` of its collectives."""
    own = under_torchrun() and not dist.is_initialized()
    if own:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield
    finally:
        if own:
            dist.destroy_process_group()
