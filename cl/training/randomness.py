"""Random numbers as a function of (seed, step, worker).

The generators are seeded anew before every step. A run that resumes at step k therefore draws what the uninterrupted
run drew, and a checkpoint needs no generator states, only the step.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from blake3 import blake3


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path such as (seed, "step", 17, rank)."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(blake3(text.encode()).digest(8), "little") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed torch (all devices), numpy and Python's generator from a path."""
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002 - what users' callbacks and towers draw from
