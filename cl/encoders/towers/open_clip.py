"""Vision and text towers of open_clip: by the name of one of its models, or by a vision_cfg / text_cfg in line.

Cherti et al. 2023, "Reproducible scaling laws for contrastive language-image learning". The modules are
open_clip's own; only the attention kernel is chosen by device and precision (cl/encoders/attention.py).
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from cl.encoders.attention import replace_attention
from cl.encoders.config import TowerConfig
from cl.encoders.inputs import ImageInput, TextInput, ViewInput
from cl.encoders.outputs import TowerOutputs
from cl.encoders.pixels import Pixels, TowerAugmentation
from cl.encoders.registry import TOWERS, TowerFamily
from cl.encoders.tokenizers import clip_bpe, folder_tokenizer
from cl.errors import ConfigError
from cl.objectives.schedule import Ramp, Scheduled, value_at
from cl.pairs import Clock
from cl.views.image_augmentation import ImageAugmentation


class OpenClipConfig(TowerConfig):
    """One tower of an open_clip model."""

    family: Literal["open_clip"] = "open_clip"
    part: Literal["vision", "text"] = Field(description="which tower of the pair")
    name: str | None = Field(
        None, description="an open_clip model such as ViT-B-32; `config` then overrides its fields"
    )
    config: dict[str, Any] = Field(default_factory=dict, description="open_clip's vision_cfg or text_cfg")
    quick_gelu: bool | None = Field(None, description="OpenAI's activation; null takes it from the named model")
    augment: TowerAugmentation = ImageAugmentation()
    mean: tuple[float, float, float] = Field(
        (0.48145466, 0.4578275, 0.40821073), description="subtracted from pixels in [0, 1]"
    )
    std: tuple[float, float, float] = Field(
        (0.26862954, 0.26130258, 0.27577711), description="pixels are divided by it"
    )
    tokenizer: str | None = Field(
        None, description="Hugging Face folder; null: CLIP's BPE cut to vocab_size (it ships with open_clip)"
    )
    patch_dropout: Scheduled | None = Field(
        None,
        description="share of a training picture's patches that the tower does not read, a number or a ramp over the "
        "run; null: `patch_dropout` in `config`",
    )
    projection: bool = Field(
        True, description="map the pooled features to embed_dim; false: they are the embedding (vision transformers)"
    )

    @model_validator(mode="after")
    def _shares(self) -> OpenClipConfig:
        share = self.patch_dropout
        if share is not None and not 0 <= self.most_dropped() < 1:
            raise ValueError(f"patch_dropout must lie in [0, 1), not {share}")
        if self.part == "text" and (share is not None or not self.projection):
            raise ValueError("patch_dropout and projection are fields of vision towers")
        return self

    def most_dropped(self) -> float:
        """The largest share of patches that is left out in a run."""
        share = self.patch_dropout
        return max(share.start, share.end) if isinstance(share, Ramp) else share or 0.0


class VisionTower(nn.Module):
    """uint8 images [B, 3, H, W] -> [B, embed_dim]; normalises the pixels on its own device.

    Vision transformers read pictures of any size with resized positions, and give features and patches too.
    """

    def __init__(self, net: nn.Module, pixels: Pixels, patch_dropout: Scheduled | None = None) -> None:
        from open_clip.transformer import VisionTransformer

        super().__init__()
        self.net, self.pixels, self.patch_dropout = net, pixels, patch_dropout
        self.has_features = isinstance(net, VisionTransformer)
        self.token_width: int | None = net.ln_post.normalized_shape[0] if isinstance(net, VisionTransformer) else None

    def forward(self, images: Tensor, whole: bool = False) -> Tensor | TowerOutputs:
        pixels = self.pixels(images)
        if not self.has_features:
            return self.net(pixels)
        made = self._transform(pixels)
        return made if whole else made.embedding

    def _transform(self, pixels: Tensor) -> TowerOutputs:
        """A vision transformer's own steps, with positions for the size of these pictures."""
        net: Any = self.net
        positions = net.positional_embedding
        grid = (pixels.shape[-2] // net.patch_size[0], pixels.shape[-1] // net.patch_size[1])
        if grid != net.grid_size:
            positions = resize_positions(positions, net.grid_size, grid)
        patches = net.conv1(pixels).flatten(2).mT
        first = net.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        states = torch.cat([first, patches], dim=1) + positions.to(patches.dtype)
        states = net.transformer(net.ln_pre(net.patch_dropout(states)))
        features, tokens = net._pool(states)
        return TowerOutputs(features if net.proj is None else features @ net.proj, features, tokens)

    def follow_(self, clock: Clock) -> None:
        """Drop the share of patches that is due at this step."""
        if self.patch_dropout is not None:
            self.net.patch_dropout.prob = value_at(self.patch_dropout, clock)  # type: ignore[union-attr]

    def load_external(self, tensors: dict[str, Tensor], where: str) -> None:
        """Load the `visual.` part of an open_clip checkpoint; position embeddings are resized to the grid."""
        from open_clip.model import resize_pos_embed

        state = {name: tensor for name, tensor in tensors.items() if name.startswith("visual.")}
        resize_pos_embed(state, SimpleNamespace(visual=self.net))
        if getattr(self.net, "proj", True) is None:
            state.pop("visual.proj", None)
        _load(self.net, {name.removeprefix("visual."): tensor for name, tensor in state.items()}, where, "vision")


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings [1 + H W, C] of a class token and an `old` = (H, W) grid of patches, for a `new` grid.

    Bicubic, as for DINO's small crops (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision
    Transformers", appendix); gradients pass through.
    """
    grid = positions[1:].T.reshape(1, -1, *old)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.flatten(2)[0].T])


class TextTower(nn.Module):
    """Token ids [B, L] -> [B, embed_dim], L up to the context length."""

    def __init__(self, net: nn.Module) -> None:
        from open_clip.transformer import TextTransformer

        super().__init__()
        self.net = net
        self.token_width: int | None = None
        if isinstance(net, TextTransformer):
            self.token_width, net.output_tokens = int(net.width), False

    def forward(self, ids: Tensor, whole: bool = False) -> Tensor | TowerOutputs:
        if not whole:
            return self.net(ids)
        net: Any = self.net
        net.output_tokens = True
        try:
            embedding, tokens = net(ids)
        finally:
            net.output_tokens = False
        return TowerOutputs(embedding, tokens=tokens)

    def words(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The token ids [B, L] and which of them are before the padding, bool [B, L]."""
        places = torch.arange(ids.shape[1], device=ids.device)
        last = ((ids != self.net.pad_id) * places).amax(1, keepdim=True)
        return ids, places <= last

    def load_external(self, tensors: dict[str, Tensor], where: str) -> None:
        """Load the text part of an open_clip checkpoint; position embeddings are resized to the context."""
        from open_clip.model import convert_to_custom_text_state_dict, resize_text_pos_embed

        state = {
            name: tensor
            for name, tensor in convert_to_custom_text_state_dict(dict(tensors)).items()
            if name.startswith("text.") and name != "text.attn_mask"
        }
        resize_text_pos_embed(state, SimpleNamespace(text=self.net))
        _load(self.net, {name.removeprefix("text."): tensor for name, tensor in state.items()}, where, "text")


def _load(net: nn.Module, state: dict[str, Tensor], where: str, part: str) -> None:
    if not state:
        raise ConfigError(f"{where} holds no weights of an open_clip {part} tower.")
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{where} does not fit the {part} tower of this model: {reason}") from error


def tower_cfg(cfg: OpenClipConfig) -> tuple[Any, bool]:
    """open_clip's own config object of the tower, and whether it takes the quick GELU."""
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    merged: dict[str, Any] = {}
    quick = cfg.quick_gelu
    if cfg.name is not None:
        named = open_clip.get_model_config(cfg.name)
        if named is None:
            import difflib

            near = difflib.get_close_matches(cfg.name, open_clip.list_models(), n=1)
            raise ConfigError(f"open_clip has no model {cfg.name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        merged = dict(named[f"{cfg.part}_cfg"])
        quick = bool(named.get("quick_gelu")) if quick is None else quick
    merged |= cfg.config
    kind: type[Any] = CLIPVisionCfg if cfg.part == "vision" else CLIPTextCfg
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(merged) - known)
    if unknown:
        raise ConfigError(f"open_clip's {cfg.part}_cfg has no field {unknown[0]!r}; it has {', '.join(sorted(known))}.")
    if merged.get("hf_model_name"):
        raise ConfigError(
            f"The text tower of {cfg.name or 'this config'} is the Hugging Face model {merged['hf_model_name']!r}: "
            "use the family huggingface for it."
        )
    return kind(**merged), bool(quick)


@TOWERS.register(
    "open_clip",
    "Vision and text towers of open_clip, by model name or config.",
    paper="Reproducible scaling laws for contrastive language-image learning",
)
class OpenClipFamily(TowerFamily):
    """How open_clip towers are configured, built and fed."""

    config = OpenClipConfig

    @staticmethod
    def build(cfg: OpenClipConfig, embed_dim: int) -> nn.Module:
        """A tower with fresh weights."""
        from open_clip import model as open_clip_model

        tower, quick = tower_cfg(cfg)
        build = open_clip_model._build_vision_tower if cfg.part == "vision" else open_clip_model._build_text_tower
        try:
            net = build(embed_dim, tower, quick)
        except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"open_clip cannot build the {cfg.part} tower {cfg.config}: {error}.") from error
        if cfg.part == "vision" and tower.timm_model_name and tower.timm_proj == "none":
            width = net.trunk.num_features
            if width != embed_dim:
                raise ConfigError(f"timm_proj is none, but the trunk's width {width} is not embed_dim {embed_dim}.")
        replace_attention(net)
        if cfg.part == "text":
            return TextTower(net)
        if cfg.patch_dropout is not None or not cfg.projection:
            _change_transformer(net, cfg, embed_dim)
        return VisionTower(net, Pixels(cfg.mean, cfg.std), cfg.patch_dropout)

    @staticmethod
    def inputs(cfg: OpenClipConfig, train: bool) -> ViewInput:
        """Images cropped to the tower's size, or token ids padded to the context or less."""
        tower, _ = tower_cfg(cfg)
        if cfg.part == "vision":
            size = tower.image_size
            if isinstance(size, (tuple, list)):
                if size[0] != size[1]:
                    raise ConfigError(f"image_size is {list(size)}, but only square images are supported.")
                size = size[0]
            return ImageInput(int(size), cfg.augment if train else None)
        context = tower.context_length
        if cfg.tokenizer is not None:
            return TextInput(folder_tokenizer(cfg.tokenizer, context, tower.vocab_size), masked=False, length=context)
        if tower.hf_tokenizer_name is not None:
            raise ConfigError(
                f"The text tower of {cfg.name} reads the tokenizer {tower.hf_tokenizer_name!r}: give the field "
                "`tokenizer` a folder that holds it."
            )
        # Padding behind the text changes nothing if the tower is causal and pools where the text ends.
        ends = not tower.no_causal_mask and not tower.embed_cls and tower.pool_type in ("argmax", "eos")
        length = None if ends and not _custom_blocks(tower) else context
        return TextInput(clip_bpe(tower.vocab_size, context), masked=False, length=length)

    @staticmethod
    def save_files(cfg: OpenClipConfig, tower: nn.Module, folder: Path) -> None:
        """Keep the tokenizer, if it is not the built-in one."""
        if cfg.part == "text" and cfg.tokenizer is not None:
            spec = OpenClipFamily.inputs(cfg, train=False)
            assert isinstance(spec, TextInput)
            folder.mkdir(parents=True, exist_ok=True)
            spec.tokenizer.save(folder)

    @staticmethod
    def restored(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The tokenizer comes from the folder."""
        return {**fields, "tokenizer": str(folder)}


def _change_transformer(net: Any, cfg: OpenClipConfig, embed_dim: int) -> None:
    """Give a vision transformer the patch dropout of its config, or take its projection away."""
    from open_clip.transformer import PatchDropout, VisionTransformer

    if not isinstance(net, VisionTransformer):
        raise ConfigError("patch_dropout and projection: false are for vision transformers, which this tower is not.")
    if cfg.patch_dropout is not None:
        net.patch_dropout = PatchDropout(cfg.most_dropped())
    if not cfg.projection:
        width = net.ln_post.normalized_shape[0]
        if width != embed_dim:
            raise ConfigError(f"projection is false, but the tower's width {width} is not embed_dim {embed_dim}.")
        net.proj = None


def _custom_blocks(tower: Any) -> bool:
    """Whether open_clip builds its own attention blocks, which want masks of the full context."""
    special = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")
    return tower.block_type == "custom" or any(getattr(tower, name) for name in special)
