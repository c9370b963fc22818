"""Number formats of a run.

fp32   everything in float32
bf16   weights, optimizer and loss in float32; matrix products of the towers in bfloat16 (autocast)
fp64   everything in float64: slow, for proofs of exactness
auto   bf16 where the hardware multiplies it natively, else fp32
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import nn

from cl.training.config import Precision


def resolve(precision: Precision, device: torch.device) -> Precision:
    """What `auto` means on a device; other choices stay.

    CPUs without bfloat16 units (AVX512-BF16, AMX) emulate it five times slower than float32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context in which towers run; objectives stay outside of it."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def cast(module: nn.Module, precision: Precision) -> nn.Module:
    """Bring a module's weights into the format in which the run keeps them."""
    return module.double() if precision == "fp64" else module.float()
