"""Random numbers that are functions of counters: (seed, step, sample, ...) -> number.

What is drawn so is the same when a tile is computed again in backward, for any tile size and for any number of workers.
The mixing is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number
Generators", fig. 17), applied to each counter in turn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # int64 arithmetic wraps, as that of uint64 does
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(value: Tensor) -> Tensor:
    value = (value ^ _shifted(value, 30)) * _FIRST
    value = (value ^ _shifted(value, 27)) * _SECOND
    return value ^ _shifted(value, 31)


def bits(seed: int, step: int, *counters: Tensor) -> Tensor:
    """64 random bits as int64, of the shape that the int64 `counters` broadcast to."""
    device = counters[0].device
    state = torch.tensor(seed, dtype=torch.int64, device=device)
    for counter in (torch.tensor(step, dtype=torch.int64, device=device), *counters):
        state = _mixed((state + _GOLDEN) ^ _mixed(counter + _GOLDEN))
    return state


def uniform(seed: int, step: int, *counters: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in [0, 1), evenly distributed; 24 random bits in float32, 53 in float64."""
    precise = dtype == torch.float64
    digits = 53 if precise else 24
    kind = torch.float64 if precise else torch.float32
    return (_shifted(bits(seed, step, *counters), 64 - digits).to(kind) * 2.0**-digits).to(dtype)


def normal(seed: int, step: int, *counters: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of the standard normal distribution (Box and Muller)."""
    first = uniform(seed, step, *counters, dtype=torch.float64)
    second = uniform(~seed, step, *counters, dtype=torch.float64)
    return ((-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()).to(dtype)


def keys_of(ids: Tensor) -> Tensor:
    """One int64 a sample from its 128-bit id, [B, 2] -> [B]."""
    return _mixed(ids[:, 0]) ^ ids[:, 1]
