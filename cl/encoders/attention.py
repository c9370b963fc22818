"""Self-attention with the kernel that is fast where it runs.

torch's scaled_dot_product_attention is the best choice nearly everywhere, but its bf16 backward on the CPU takes
longer than two plain matrix products and a softmax: at the sizes of CLIP towers half of a training step. The rule,
measured by tests/benchmarks/bench_attention.py, is in `use_explicit`; both kernels compute the same numbers.

open_clip's blocks hold `nn.MultiheadAttention`; `replace_attention` puts `SelfAttention` in its place, which takes
over the very parameters under the same names, so checkpoints do not notice. Hugging Face models take the same kernel
through the attention interface of transformers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPLICIT_TOKENS = 512  # above this the explicit kernel's [L, L] matrix costs more than it saves


def use_explicit(query: Tensor) -> bool:
    """Whether the explicit kernel is the faster one: bf16 on the CPU, up to EXPLICIT_TOKENS tokens."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[-2] <= EXPLICIT_TOKENS


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention over heads.

    Args:
        query, key, value: [B, H, L, D].
        mask: None, bool (True: attend) or additive, broadcast to [B, H, L, L].
        scale: of the logits; None is 1 / sqrt(D).
        dropout: probability of dropping an attention weight.

    Returns:
        [B, H, L, D].
    """
    if use_explicit(query):
        return explicit_attention(query, key, value, mask, scale, dropout)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T scale + mask) v as two matrix products; shapes as in `attend`."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (query * scale) @ key.transpose(-1, -2)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=logits.dtype).masked_fill_(~mask, float("-inf"))
        logits = logits + mask.to(logits.dtype)
    weights = F.dropout(logits.softmax(dim=-1), dropout) if dropout else logits.softmax(dim=-1)
    return weights.to(value.dtype) @ value


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
        grouped = getattr(module, "num_key_value_groups", 1) > 1
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", False) if causal is None else causal
        plain = options.get("position_bias") is None and options.get("cache") is None and not options.get("softcap")
        if grouped or not plain or (attention_mask is None and causal) or not use_explicit(query):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        out = explicit_attention(
            query, key, value, attention_mask, options.get("scaling"), options.get("dropout") or 0.0
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("clew", forward)
    AttentionMaskInterface.register("clew", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return "clew"
