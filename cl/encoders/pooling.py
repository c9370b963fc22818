"""How the states of a text's tokens become one vector."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cl.encoders.attention import attend
from cl.errors import ConfigError

PoolingKind = Literal["mean", "cls", "last", "latent"]


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Token states [B, L, C] and mask [B, L], padded on either side -> [B, C].

    `cls` is the first token, `last` the last (an end-of-text token, if the tokenizer gives one), all else the mean. A
    text without tokens gives zeros under the mean.
    """
    if pooling == "cls":
        place = mask.argmax(1)
    elif pooling == "last":
        place = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    else:
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp_min(1)
    return states[torch.arange(len(states), device=states.device), place]


class LatentAttention(nn.Module):
    """Token states [B, L, C] attend to a trained array of latents, then pass an MLP; the mean over tokens follows.

    Lee et al. 2024, "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models": queries are the
    states, keys and values the latents. Both halves have a residual path and norms before them.
    """

    def __init__(self, width: int, latents: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"latent_heads is {heads}, which does not divide the tower's hidden size {width}.")
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, width) / width**0.5)
        self.norm_states, self.norm_latents, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor) -> Tensor:
        batch, _, width = states.shape
        query = self._by_head(self.query(self.norm_states(states)))
        key, value = self.key_value(self.norm_latents(self.latents)).expand(batch, -1, -1).chunk(2, dim=-1)
        read = attend(query, self._by_head(key), self._by_head(value), None).transpose(1, 2)
        states = states + self.out(read.reshape(batch, -1, width))
        return states + self.mlp(self.norm_mlp(states))

    def _by_head(self, each: Tensor) -> Tensor:
        """[B, T, C] -> [B, H, T, C / H]."""
        return each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
