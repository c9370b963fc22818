"""Text towers of Hugging Face transformers: from a folder (or hub name), or from scratch by a config.

Encoders (BERT and its kin) and decoders (Llama, Qwen, Mistral ...): the embedding of a text does not depend on how much
padding stands on either side of it. `bidirectional` lets the tokens of a decoder see what follows them (BehnamGhader et
al. 2024, "LLM2Vec: Large Language Models Are Secretly Powerful Text Encoders"). A linear head maps to the shared space.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from cl.encoders.auto_model import build_net, load_projection_, read_config
from cl.encoders.config import TowerConfig
from cl.encoders.heads import HeadKind, build_head
from cl.encoders.inputs import TextInput, ViewInput
from cl.encoders.outputs import TowerOutputs
from cl.encoders.pooling import LatentAttention, PoolingKind, pool
from cl.encoders.registry import TOWERS, TowerFamily
from cl.encoders.tokenizers import clip_bpe, ending, folder_tokenizer
from cl.errors import ConfigError


class HuggingFaceConfig(TowerConfig):
    """A transformers encoder, its pooling and its head."""

    family: Literal["huggingface"] = "huggingface"
    name: str | None = Field(None, description="folder or hub name of a model; null: from scratch by `config`")
    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of the transformers config (model_type, hidden_size, ...)"
    )
    pretrained: bool = Field(True, description="load the weights of `name`; false: its architecture from scratch")
    pooling: PoolingKind = Field(
        "mean", description="how token states become one vector; latent: latent attention, then the mean (NV-Embed)"
    )
    latents: int = Field(512, gt=0, description="rows of the latent array; pooling latent only")
    latent_heads: int = Field(8, gt=0, description="attention heads that read the latents; pooling latent only")
    bidirectional: bool = Field(False, description="tokens of a decoder see those that follow them as well")
    eos: str | None = Field(
        None,
        description="token put behind every text, such as </s>, which `last` then pools; null: as the tokenizer does",
    )
    head: HeadKind = Field("linear", description="map from the hidden size to embed_dim")
    max_tokens: int = Field(64, gt=1, description="longer texts are cut, tokens")
    tokenizer: str | None = Field(
        None, description="folder of a tokenizer; null: that of `name`, else CLIP's BPE cut to vocab_size"
    )

    @model_validator(mode="after")
    def _has_architecture(self) -> HuggingFaceConfig:
        if self.name is None and "model_type" not in self.config:
            raise ValueError("give `name` (a folder or hub name) or `config` with a model_type such as bert")
        return self


class HuggingFaceTower(nn.Module):
    """{"input_ids": [B, L], "attention_mask": [B, L]} -> [B, embed_dim]."""

    has_features = True

    def __init__(self, net: nn.Module, cfg: HuggingFaceConfig, embed_dim: int, decodes: bool) -> None:
        super().__init__()
        self.net, self.pooling, self.decodes = net, cfg.pooling, decodes
        width = self.token_width = int(net.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.latent: nn.Module | None = None
        if cfg.pooling == "latent":
            self.latent = LatentAttention(width, cfg.latents, cfg.latent_heads)
        self.head = build_head(cfg.head, width, embed_dim)

    def forward(self, tokens: dict[str, Tensor], whole: bool = False) -> Tensor | TowerOutputs:
        mask = tokens["attention_mask"]
        # Of a decoder, positions count from the first real token, and nothing is kept for a next one.
        decoding = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0), "use_cache": False} if self.decodes else {}
        states = self.net(input_ids=tokens["input_ids"], attention_mask=mask, **decoding).last_hidden_state
        features = pool(states if self.latent is None else self.latent(states), mask, self.pooling)
        embedding = self.head(features)
        return TowerOutputs(embedding, features, states) if whole else embedding

    def words(self, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The token ids [B, L] and which of them are real, bool [B, L]."""
        return tokens["input_ids"], tokens["attention_mask"].bool()

    def load_external(self, tensors: dict[str, Tensor], where: str) -> None:
        """Hugging Face weights come with `name`, not through `weights`."""
        raise ConfigError(f"{where} cannot be loaded into a huggingface tower: set its `name` to the model's folder.")


def _is_decoder(net: nn.Module) -> bool:
    """Whether a transformer takes the positions of its tokens and has causal attention."""
    positioned = "position_ids" in inspect.signature(net.forward).parameters
    return positioned and any(getattr(module, "is_causal", False) for module in net.modules())


@TOWERS.register(
    "huggingface",
    "Text towers of Hugging Face transformers, from a folder or from scratch.",
    paper="Transformers: State-of-the-Art Natural Language Processing",
)
class HuggingFaceFamily(TowerFamily):
    """How Hugging Face towers are configured, built and fed."""

    config = HuggingFaceConfig

    @staticmethod
    def build(cfg: HuggingFaceConfig, embed_dim: int) -> nn.Module:
        """A tower with the weights of `name`, or fresh ones."""
        config = read_config(cfg.name, cfg.config, "text")
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and cfg.max_tokens > positions:
            raise ConfigError(f"max_tokens is {cfg.max_tokens}, but the tower has {positions} position embeddings.")
        if cfg.bidirectional:
            config.is_causal = False  # the masks that transformers makes
        net: Any = build_net(cfg.name, config, cfg.pretrained)
        decodes = _is_decoder(net)
        if cfg.bidirectional:
            if not decodes:
                raise ConfigError(f"bidirectional is for decoders, which {config.model_type} is not.")
            for module in net.modules():
                if hasattr(module, "is_causal"):
                    module.is_causal = False  # attention where there is no mask
        if getattr(net, "pooler", None) is not None:
            net.pooler = None  # not used: its parameters would never get a gradient
        tower = HuggingFaceTower(net, cfg, embed_dim, decodes)
        if cfg.name is not None and cfg.pretrained:
            load_projection_(tower.head, cfg.name, "text")
        return tower

    @staticmethod
    def inputs(cfg: HuggingFaceConfig, train: bool) -> ViewInput:
        """Token ids and mask, padded to the longest text of the batch."""
        vocab_size = int(read_config(cfg.name, cfg.config, "text").vocab_size)
        folder = cfg.tokenizer or cfg.name
        if folder is None:
            tokenizer = clip_bpe(vocab_size, cfg.max_tokens)
        else:
            tokenizer = folder_tokenizer(folder, cfg.max_tokens, vocab_size)
        return TextInput(tokenizer if cfg.eos is None else ending(tokenizer, cfg.eos), masked=True)

    @staticmethod
    def save_files(cfg: HuggingFaceConfig, tower: nn.Module, folder: Path) -> None:
        """Keep the architecture and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        tower.net.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        spec = HuggingFaceFamily.inputs(cfg, train=False)
        assert isinstance(spec, TextInput)
        spec.tokenizer.save(folder)

    @staticmethod
    def restored(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Architecture and tokenizer come from the folder, weights from the checkpoint."""
        return {**fields, "name": str(folder), "config": {}, "pretrained": False, "tokenizer": None, "eos": None}
