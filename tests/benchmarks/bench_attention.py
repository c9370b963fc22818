"""Attention kernels on the CPU: forward and backward of one layer, best of five, milliseconds.

    python -m tests.benchmarks.bench_attention

The rule in cl/encoders/attention.py (bf16 on the CPU: attention in fp32) rests on this table. 8,192 tokens a call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cl.encoders.attention import attend

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two matrix products and a softmax."""
    return ((q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])).softmax(-1) @ v


KERNELS: dict[str, tuple[torch.dtype, Kernel]] = {
    "bf16 SDPA": (torch.bfloat16, F.scaled_dot_product_attention),
    "bf16 products": (torch.bfloat16, products),
    "bf16 in fp32 (Clew)": (torch.bfloat16, lambda q, k, v: attend(q, k, v, None)),
    "fp32 SDPA": (torch.float32, F.scaled_dot_product_attention),
    "fp32 products": (torch.float32, products),
}


def best(kernel: Kernel, dtype: torch.dtype, tokens: int, width: int, rounds: int = 5) -> float:
    """Milliseconds of forward and backward."""
    shape = (max(1, 8192 // tokens), tokens, 4, width)
    q, k, v = (torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        kernel(q, k, v).sum().backward()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def main() -> None:
    """Print the table."""
    print(f"{'tokens':>7} {'width':>6} " + " ".join(f"{name:>20}" for name in KERNELS))
    for tokens, width in ((16, 32), (65, 32), (77, 64), (197, 64), (257, 64), (512, 64)):
        times = [best(kernel, dtype, tokens, width) for dtype, kernel in KERNELS.values()]
        print(f"{tokens:7} {width:6} " + " ".join(f"{each:20.1f}" for each in times))


if __name__ == "__main__":
    main()
