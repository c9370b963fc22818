"""Captioning: a decoder that reads the picture predicts each word of the caption from those before it.

    L = sum_i w_i sum_t - log p(y_i,t+1 | y_i,1..t, x_i) / sum_i w_i T_i

Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models", eq. 3; T_i counts the words that are
predicted. The decoder is the paper's upper half: layers of causal self-attention over the text tower's tokens and
cross-attention to the picture's, then an MLP each; the text tower (causal itself) is the lower half. Needs the tokens
of both views (`outputs: [embedding, tokens]` in the model config). The decoder belongs to the objective, and a few
samples are decoded at a time and again in backward, so memory does not grow with batch x vocabulary.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cl.config import Config
from cl.engine import moments
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.errors import ConfigError
from cl.objectives.base import OBJECTIVES, Objective
from cl.pairs import Pairs


class CaptioningConfig(Config):
    views: list[str] = Field(
        ["image_tokens", "text_tokens"], min_length=2, max_length=2, description="tokens of the picture, of the text"
    )
    vocabulary: int = Field(49408, ge=2, description="words that the text tower's tokenizer knows")
    layers: int = Field(12, ge=1, description="of the decoder")
    heads: int = Field(8, ge=1, description="of attention in each layer")
    width: int | None = Field(None, ge=1, description="of the decoder; default: that of the embeddings")
    rows: int = Field(32, ge=1, description="samples that are decoded at a time")
    dimensions: int | None = Field(None, ge=1, description="of the tokens; default: the embeddings of the model")

    @model_validator(mode="after")
    def _heads_divide(self) -> CaptioningConfig:
        if self.width is not None and self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class Attention(nn.Module):
    """Multi-head attention of `states` [B, T, W] to `memory` [B, S, W]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, states: Tensor, memory: Tensor, causal: bool) -> Tensor:
        query, key, value = (
            layer(rows).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, rows in ((self.query, states), (self.key, memory), (self.value, memory))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Self-attention to earlier words, cross-attention to the picture, MLP; each on normalised input, added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.words, self.picture = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, words: Tensor, picture: Tensor) -> Tensor:
        seen = self.norms[0](words)
        words = words + self.words(seen, seen, causal=True)
        words = words + self.picture(self.norms[1](words), picture, causal=False)
        return words + self.mlp(self.norms[2](words))


class Decoder(nn.Module):
    """Tokens of pictures [B, S, D] and texts [B, T, D] -> scores of the next word [B, T, V]."""

    def __init__(self, dimensions: int, width: int, layers: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.read_picture, self.read_words = nn.Linear(dimensions, width), nn.Linear(dimensions, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.layers = nn.ModuleList(DecoderLayer(width, heads) for _ in range(layers))
        self.vocabulary = nn.Linear(width, vocabulary, bias=False)

    def forward(self, picture: Tensor, words: Tensor) -> Tensor:
        # Tokens come with length 1; layers of attention expect numbers of about 1.
        picture, words = self.norms[0](self.read_picture(picture)), self.norms[1](self.read_words(words))
        for layer in self.layers:
            words = layer(words, picture)
        return self.vocabulary(self.norms[2](words))


@OBJECTIVES.register(
    "captioning",
    "a decoder that reads the picture predicts each word of the caption from those before it",
    paper="CoCa: Contrastive Captioners are Image-Text Foundation Models",
)
class Captioning(Objective):
    """See the module's formula. Parameters: the decoder."""

    Config = CaptioningConfig
    compares = "nothing: a picture with its own caption"
    needs = ("tokens of both views", "words")
    memory = "rows x words x vocabulary"

    def __init__(self, config: CaptioningConfig) -> None:
        super().__init__()
        assert config.dimensions is not None
        width = config.width or config.dimensions
        if width % config.heads:
            raise ConfigError(f"captioning: heads ({config.heads}) must divide the decoder's width ({width}).")
        self.config, self.fits = config, False
        self.decoder = Decoder(config.dimensions, width, config.layers, config.heads, config.vocabulary)

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        first, second = self.config.views
        ids, real = pairs.words(second)
        if not self.fits and len(ids):  # once: every text ends with the tokenizer's last number
            self.fits = int(ids.max()) < self.config.vocabulary
            if not self.fits:
                raise ConfigError(
                    f"captioning: vocabulary is {self.config.vocabulary}, but the view {second!r} has words up to the "
                    f"number {int(ids.max())}."
                )
        weight = pairs.weights().where((pairs.view_weights(first) > 0) & (pairs.view_weights(second) > 0), 0)
        counted = real[:, 1:] * weight[:, None]
        rows = self.config.rows
        parts = [
            checkpoint(
                self._negative_log_likelihood,
                pairs.view(first)[i : i + rows].to(pairs.dtype),
                pairs.view(second)[i : i + rows].to(pairs.dtype),
                ids[i : i + rows],
                counted[i : i + rows],
                use_reentrant=False,
            )
            for i in range(0, max(len(ids), 1), rows)
        ]
        words = workers.all_reduce(counted.sum())
        loss = moments.total(torch.stack(parts).sum(), workers) / words.where(words > 0, 1)
        return Outcome(moments.replicated(loss, workers), {"words": words})

    def _negative_log_likelihood(self, picture: Tensor, words: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
        """The weighted sum over the words that `counted` [B, T - 1] gives weight; 0-d."""
        alive = (counted.sum(1) > 0)[:, None, None]
        scores = self.decoder(picture.where(alive, 0), words.where(alive, 0)[:, :-1])
        losses = F.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none")
        return (losses * counted).sum()
