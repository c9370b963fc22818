"""Text towers of Hugging Face transformers: from a folder (or hub name), or from scratch by a config.

Pooling is the mean over tokens, the first token or the last; a linear head maps to the shared space. Weights are
read from safetensors only and no code of a model's repository is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cl.encoders.attention import register_with_transformers
from cl.encoders.config import TowerConfig
from cl.encoders.inputs import TextInput, ViewInput
from cl.encoders.outputs import TowerOutputs
from cl.encoders.registry import TOWERS, TowerFamily
from cl.encoders.tokenizers import clip_bpe, folder_tokenizer
from cl.errors import ConfigError


class HuggingFaceConfig(TowerConfig):
    """A transformers encoder, its pooling and its head."""

    family: Literal["huggingface"] = "huggingface"
    name: str | None = Field(None, description="folder or hub name of a model; null: from scratch by `config`")
    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of the transformers config (model_type, hidden_size, ...)"
    )
    pretrained: bool = Field(True, description="load the weights of `name`; false: its architecture from scratch")
    pooling: Literal["mean", "cls", "last"] = Field("mean", description="how token states become one vector")
    head: Literal["linear", "mlp", "none"] = Field("linear", description="map from the hidden size to embed_dim")
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

    def __init__(self, net: nn.Module, pooling: str, head: str, embed_dim: int) -> None:
        super().__init__()
        self.net, self.pooling = net, pooling
        hidden = self.token_width = int(net.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.head: nn.Module
        if head == "linear":
            self.head = nn.Linear(hidden, embed_dim, bias=False)
        elif head == "mlp":
            middle = (hidden + embed_dim) // 2
            self.head = nn.Sequential(nn.Linear(hidden, middle), nn.GELU(), nn.Linear(middle, embed_dim, bias=False))
        else:
            if hidden != embed_dim:
                raise ConfigError(f"head is none, but the tower's hidden size {hidden} is not embed_dim {embed_dim}.")
            self.head = nn.Identity()

    def forward(self, tokens: dict[str, Tensor], whole: bool = False) -> Tensor | TowerOutputs:
        mask = tokens["attention_mask"]
        states = self.net(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        features = pool(states, mask, self.pooling)
        embedding = self.head(features)
        return TowerOutputs(embedding, features, states) if whole else embedding

    def words(self, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The token ids [B, L] and which of them are real, bool [B, L]."""
        return tokens["input_ids"], tokens["attention_mask"].bool()

    def load_external(self, tensors: dict[str, Tensor], where: str) -> None:
        """Hugging Face weights come with `name`, not through `weights`."""
        raise ConfigError(f"{where} cannot be loaded into a huggingface tower: set its `name` to the model's folder.")


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Token states [B, L, C] and mask [B, L] -> [B, C]; an empty text gives zeros under `mean`."""
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp_min(1)
    if pooling == "cls":
        return states[:, 0]
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


def _net_config(cfg: HuggingFaceConfig) -> Any:
    from transformers import AutoConfig

    fields = dict(cfg.config)
    try:
        if cfg.name is not None:
            return AutoConfig.from_pretrained(cfg.name, trust_remote_code=False, **fields)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
        what = f"{cfg.name} is not a model that transformers can read" if cfg.name else "config is not understood"
        raise ConfigError(f"{what}: {reason}.") from error


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
        from transformers import AutoModel

        net_config = _net_config(cfg)
        positions = getattr(net_config, "max_position_embeddings", None)
        if positions is not None and cfg.max_tokens > positions:
            raise ConfigError(f"max_tokens is {cfg.max_tokens}, but the tower has {positions} position embeddings.")
        kernel = register_with_transformers()
        try:
            if cfg.name is not None and cfg.pretrained:
                net = AutoModel.from_pretrained(
                    cfg.name,
                    config=net_config,
                    attn_implementation=kernel,
                    use_safetensors=True,
                    trust_remote_code=False,
                    dtype=torch.float32,
                )
            else:
                net = AutoModel.from_config(net_config, attn_implementation=kernel)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"{cfg.name or cfg.config} cannot be built: {' '.join(str(error).split())[:300]}"
            ) from error
        if getattr(net, "pooler", None) is not None:
            net.pooler = None  # not used: its parameters would never get a gradient
        return HuggingFaceTower(net, cfg.pooling, cfg.head, embed_dim)

    @staticmethod
    def inputs(cfg: HuggingFaceConfig, train: bool) -> ViewInput:
        """Token ids and mask, padded to the longest text of the batch."""
        vocab_size = int(_net_config(cfg).vocab_size)
        folder = cfg.tokenizer or cfg.name
        if folder is None:
            return TextInput(clip_bpe(vocab_size, cfg.max_tokens), masked=True)
        return TextInput(folder_tokenizer(folder, cfg.max_tokens, vocab_size), masked=True)

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
        return {**fields, "name": str(folder), "config": {}, "pretrained": False, "tokenizer": None}
