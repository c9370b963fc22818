"""The two matrix products of a tile, at the precision that each needs and the speed that the hardware has.

*Scores* are never rounded to a half type: at a scale of 100 a cosine in bfloat16 is wrong by up to 0.2 in the logit.
*Gradients*, slopes times embeddings, may take slopes in the embeddings' half type, as every half precision trainer
does; they are summed in float32.

CUDA multiplies half types into float32. On the CPU PyTorch has no such product. Scores of half types are widened there,
which is exact, and multiplied in float32 (`wide` does it once for an operand of many products); as widened bfloat16
loses nothing when it is narrowed again, oneDNN may use its bfloat16 units (AMX), which sum in float32. A tile's
gradient comes from the bfloat16 product, whose sums are float32 inside and rounded once at the end, where the CPU has
instructions for it (2 to 2.5 times the speed of float32); the sum over tiles stays in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

HALF_TYPES = (torch.bfloat16, torch.float16)


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    """float32 for half types, the type itself otherwise."""
    return torch.float32 if dtype in HALF_TYPES else dtype


def wide(operand: Tensor) -> Tensor:
    """An operand in the type in which `product` multiplies it: itself, or a copy in float32."""
    return operand.float() if operand.dtype in HALF_TYPES and not operand.is_cuda else operand


def product(left: Tensor, right: Tensor, widened_from: torch.dtype | None = None) -> Tensor:
    """left [m, k] times right [k, n], accumulated and returned in float32 where the inputs are of a half type.

    Args:
        widened_from: the type of both before one of them went through `wide`.
    """
    bfloat16 = (widened_from or left.dtype) == torch.bfloat16 and (widened_from or right.dtype) == torch.bfloat16
    left, right = wide(left), wide(right)
    if left.dtype in HALF_TYPES:
        return torch.mm(left, right, out_dtype=torch.float32)
    if bfloat16 and not left.is_cuda:
        with _bfloat16_inside():
            return left @ right
    return left @ right


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left times right, in place, in the type of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.dtype == torch.bfloat16 and not left.is_cuda and bfloat16_instructions():
        total += left @ right
    else:
        total += product(left, right)


@cache
def bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 itself; without, PyTorch's bfloat16 product is slower than float32."""
    has = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and bool(has.get("avx512_bf16") or has.get("amx_bf16"))


@contextmanager
def _bfloat16_inside() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices whose values are those of bfloat16 as bfloat16."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
