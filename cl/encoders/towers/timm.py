"""Vision towers of timm: any of its models, from scratch or from a safetensors file of timm's.

    image: {family: timm, name: vit_small_patch16_224, config: {img_size: 112, reg_tokens: 4, patch_drop_rate: 0.5}}

`weights: {image: FILE.safetensors}` fills the trunk; positions are resized to the grid. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
import sys
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from cl.encoders.config import TowerConfig
from cl.encoders.heads import HeadKind, build_head
from cl.encoders.inputs import ImageInput, ViewInput
from cl.encoders.outputs import TowerOutputs
from cl.encoders.pixels import Pixels, TowerAugmentation
from cl.encoders.registry import TOWERS, TowerFamily
from cl.errors import ConfigError
from cl.views.image_augmentation import ImageAugmentation

# They would load weights or pickles, or give something that is no tower.
_RESERVED = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes"}
_RESERVED |= {"in_chans", "features_only", "out_indices", "scriptable", "exportable", "no_jit"}


class TimmConfig(TowerConfig):
    """A timm model and its head."""

    family: Literal["timm"] = "timm"
    name: str = Field(description="a timm model such as vit_small_patch16_224")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the model (img_size, depth, global_pool, reg_tokens, patch_drop_rate, ...)",
    )
    head: HeadKind = Field("linear", description="map from the pooled features to embed_dim")
    image_size: int | None = Field(
        None, gt=0, description="side of the picture in pixels; null: img_size in `config`, else the model's own"
    )
    augment: TowerAugmentation = ImageAugmentation()
    mean: tuple[float, float, float] | None = Field(
        None, description="subtracted from pixels in [0, 1]; null: the model's own"
    )
    std: tuple[float, float, float] | None = Field(None, description="pixels are divided by it; null: the model's own")

    @field_validator("config")
    @classmethod
    def _no_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(_RESERVED & set(value)):
            raise ValueError(f"{reserved[0]} is not for a config to say")
        return value


class TimmTower(nn.Module):
    """uint8 images [B, 3, H, W] -> [B, embed_dim]; transformers give their patches as tokens."""

    has_features = True

    def __init__(self, net: Any, pixels: Pixels, head: HeadKind, embed_dim: int) -> None:
        super().__init__()
        self.net, self.pixels = net, pixels
        self.prefix = getattr(net, "num_prefix_tokens", None)  # None: the states are a map, not a sequence
        self.token_width: int | None = None if self.prefix is None else int(net.num_features)
        self.head = build_head(head, int(net.head_hidden_size), embed_dim)

    def forward(self, images: Tensor, whole: bool = False) -> Tensor | TowerOutputs:
        states = self.net.forward_features(self.pixels(images))
        features = self.net.forward_head(states, pre_logits=True)
        embedding = self.head(features)
        if not whole:
            return embedding
        return TowerOutputs(embedding, features, None if self.prefix is None else states[:, self.prefix :])

    def load_external(self, tensors: dict[str, Tensor], where: str) -> None:
        """Load a timm checkpoint of the same model, without its classifier."""
        net: Any = self.net
        prepare = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        classifiers = net.pretrained_cfg.get("classifier") or ()
        heads = [classifiers] if isinstance(classifiers, str) else list(classifiers)
        own = {key: value for key, value in tensors.items() if not any(key.startswith(f"{head}.") for head in heads)}
        try:
            net.load_state_dict(own if prepare is None else prepare(own, net))
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"{where} does not fit the timm model of this tower: {reason}") from error


@lru_cache(maxsize=16)
def _defaults(name: str) -> dict[str, Any]:
    """timm's own picture size and constants of a model.

    Raises:
        ConfigError: timm has no such model.
    """
    import timm

    if not timm.is_model(name):  # also names that timm would look up on a hub or in a folder
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ConfigError(f"timm has no model {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
    found = timm.get_pretrained_cfg(name)
    return {"input_size": (3, 224, 224)} if found is None else found.to_dict()


def _constants(cfg: TimmConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    own = _defaults(cfg.name)
    mean, std = own.get("mean", IMAGENET_DEFAULT_MEAN), own.get("std", IMAGENET_DEFAULT_STD)
    return tuple(cfg.mean or mean), tuple(cfg.std or std)


def _side(cfg: TimmConfig) -> int:
    size = cfg.image_size or cfg.config.get("img_size") or _defaults(cfg.name)["input_size"][-1]
    if not isinstance(size, int):
        raise ConfigError(f"img_size is {size}, but only square images are supported: give one number.")
    return size


@TOWERS.register("timm", "Vision towers of timm, by model name, from scratch or from a safetensors file.")
class TimmFamily(TowerFamily):
    """How timm towers are configured, built and fed."""

    config = TimmConfig

    @staticmethod
    def build(cfg: TimmConfig, embed_dim: int) -> nn.Module:
        """A tower with fresh weights."""
        import timm

        pixels = Pixels(*_constants(cfg))
        side, arguments = _side(cfg), dict(cfg.config)
        positioned = side != _defaults(cfg.name)["input_size"][-1] and "img_size" not in arguments
        try:
            try:
                size: dict[str, Any] = {"img_size": side} if positioned else {}
                net = timm.create_model(cfg.name, num_classes=0, **arguments, **size)
            except TypeError as error:
                if not positioned or "img_size" not in str(error):
                    raise
                net = timm.create_model(cfg.name, num_classes=0, **arguments)  # a network that reads any size
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"timm cannot build {cfg.name} with {cfg.config}: {error}.") from error
        return TimmTower(net, pixels, cfg.head, embed_dim)

    @staticmethod
    def inputs(cfg: TimmConfig, train: bool) -> ViewInput:
        """Images cropped to the tower's size."""
        return ImageInput(_side(cfg), cfg.augment if train else None)
