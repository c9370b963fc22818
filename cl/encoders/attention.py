"""Self-attention with the kernel that is fast where it runs.

torch's scaled_dot_product_attention is the best choice nearly everywhere, but its bf16 kernel for the CPU is slower
than its fp32 kernel: at the sizes of CLIP towers two to ten times, half of a training step and more. So on the CPU
attention runs in fp32, cast back afterwards: faster than two bf16 matrix products and a softmax as well, with less
rounding (tests/benchmarks/bench_attention.py compares all of them).

open_clip's blocks hold `nn.MultiheadAttention`; `replace_attention` puts `SelfAttention` in its place, which takes
over the very parameters under the same names, so checkpoints do not notice. Hugging Face models take the same kernel
through the attention interface of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def in_float32(query: Tensor) -> bool:
    """Whether attention on this tensor runs in fp32: half precision on the CPU."""
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v over heads.

    Args:
        query, key, value: [B, H, L, D].
        mask: None, bool (True: attend) or additive, broadcast to [B, H, L, L].
        dropout: probability of dropping an attention weight.

    Returns:
        [B, H, L, D] in the dtype of `query`.
    """
    if not in_float32(query):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    mask = _float_mask(mask)
    with torch.autocast(query.device.type, enabled=False):  # it would cast back to half precision
        out = F.scaled_dot_product_attention(
            query.float(), key.float(), value.float(), attn_mask=mask, dropout_p=dropout
        )
    return out.to(query.dtype)


def _float_mask(mask: Tensor | None) -> Tensor | None:
    return mask.float() if mask is not None and mask.dtype != torch.bool else mask


class SelfAttention(nn.Module):
    """Drop-in for an `nn.MultiheadAttention` (batch first, no bias_kv) that is used as self-attention.

    A mask larger than the input is cut to its first tokens, so that a causal text tower takes batches that were
    padded to less than its context.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.dropout = original.num_heads, original.dropout
        self.in_proj_weight, self.in_proj_bias = original.in_proj_weight, original.in_proj_bias
        self.out_proj = original.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attend over `query` [B, L, C]; `key` and `value` must be the same tensor."""
        batch, tokens, width = query.shape
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, tokens, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        mask = None
        if attn_mask is not None:
            mask = attn_mask[..., :tokens, :tokens].to(q.dtype)
            if mask.dim() == 3:  # [B * H, L, L], as nn.MultiheadAttention has it
                mask = mask.view(batch, self.num_heads, tokens, tokens)
        out = attend(q, k, v, mask, dropout=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).reshape(batch, tokens, width)), None


def replace_attention(module: nn.Module) -> int:
    """Swap the self-attention of open_clip's residual blocks below `module`; returns how many were swapped."""
    from open_clip.transformer import ResidualAttentionBlock

    swapped = 0
    for block in module.modules():
        if isinstance(block, ResidualAttentionBlock) and not hasattr(block, "ln_1_kv"):
            original = block.attn
            if isinstance(original, nn.MultiheadAttention) and original.batch_first and original.bias_k is None:
                block.attn = SelfAttention(original)
                swapped += 1
    return swapped


def register_with_transformers() -> str:
    """Make the kernel known to transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        if not in_float32(query):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        dtype = query.dtype
        with torch.autocast(query.device.type, enabled=False):
            out, _ = sdpa_attention_forward(
                module, query.float(), key.float(), value.float(), _float_mask(attention_mask), **options
            )
        return out.to(dtype), None

    AttentionInterface.register("clew", forward)
    AttentionMaskInterface.register("clew", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return "clew"
