"""Vision towers of Hugging Face transformers: CLIP's, SigLIP's, ViT, DINOv2 and others, from a folder or a config.

    image: {family: huggingface_vision, name: path/to/dinov2, head: linear}
    image: {family: huggingface_vision, config: {model_type: vit, hidden_size: 192, image_size: 112, ...}}

Of a CLIP folder the vision half is taken, and its projection is the head if the head is linear and of its size.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from cl import storage
from cl.encoders.auto_model import build_net, load_projection_, read_config
from cl.encoders.config import TowerConfig
from cl.encoders.heads import HeadKind, build_head
from cl.encoders.inputs import ImageInput, ViewInput
from cl.encoders.outputs import TowerOutputs
from cl.encoders.pixels import Pixels, TowerAugmentation
from cl.encoders.registry import TOWERS, TowerFamily
from cl.errors import ConfigError
from cl.views.image_augmentation import ImageAugmentation

PIXELS_FILE = "preprocessor_config.json"


class HuggingFaceVisionConfig(TowerConfig):
    """A transformers image encoder, its pooling and its head."""

    family: Literal["huggingface_vision"] = "huggingface_vision"
    name: str | None = Field(None, description="folder or hub name of a model; null: from scratch by `config`")
    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of the transformers config (model_type, hidden_size, image_size, ...)"
    )
    pretrained: bool = Field(True, description="load the weights of `name`; false: its architecture from scratch")
    pooling: Literal["pooler", "cls", "mean"] = Field(
        "pooler", description="the model's own pooled output, its class token or the mean of its patches"
    )
    head: HeadKind = Field("linear", description="map from the hidden size to embed_dim")
    augment: TowerAugmentation = ImageAugmentation()
    mean: tuple[float, float, float] | None = Field(
        None, description=f"subtracted from pixels in [0, 1]; null: that of {PIXELS_FILE} in the folder, else 0.5"
    )
    std: tuple[float, float, float] | None = Field(
        None, description="pixels are divided by it; null: as for the mean, else 0.5"
    )

    @model_validator(mode="after")
    def _has_architecture(self) -> HuggingFaceVisionConfig:
        if self.name is None and "model_type" not in self.config:
            raise ValueError("give `name` (a folder or hub name) or `config` with a model_type such as vit")
        return self


class HuggingFaceVisionTower(nn.Module):
    """uint8 images [B, 3, H, W] -> [B, embed_dim]; normalises the pixels on its own device."""

    has_features = True

    def __init__(self, net: nn.Module, pixels: Pixels, pooling: str, head: HeadKind, embed_dim: int) -> None:
        super().__init__()
        self.net, self.pixels, self.pooling = net, pixels, pooling
        config: Any = net.config
        sizes = getattr(config, "hidden_sizes", None)  # convolutional networks have one a stage
        self.token_width = int(sizes[-1] if sizes else config.hidden_size)
        self.side = config.image_size
        self.resizes = "interpolate_pos_encoding" in inspect.signature(net.forward).parameters
        self.head = build_head(head, self.token_width, embed_dim)

    def forward(self, images: Tensor, whole: bool = False) -> Tensor | TowerOutputs:
        pixels = self.pixels(images)
        resized = {"interpolate_pos_encoding": True} if self.resizes and pixels.shape[-1] != self.side else {}
        out = self.net(pixel_values=pixels, **resized)
        states = out.last_hidden_state
        if states.dim() == 4:  # a map [B, C, H, W]
            states = states.flatten(2).mT
            patches = states
        else:
            patch = self.net.config.patch_size  # type: ignore[union-attr]
            patches = states[:, states.shape[1] - (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch) :]
        if self.pooling == "pooler":
            features = out.pooler_output
        else:
            features = patches.mean(1) if self.pooling == "mean" else states[:, 0]
        embedding = self.head(features)
        return TowerOutputs(embedding, features, patches) if whole else embedding

    def load_external(self, tensors: dict[str, Tensor], where: str) -> None:
        """Hugging Face weights come with `name`, not through `weights`."""
        raise ConfigError(f"{where} cannot be loaded into a huggingface_vision tower: set its `name` to the folder.")


def _pixels(cfg: HuggingFaceVisionConfig) -> dict[str, tuple[float, ...]]:
    file = None if cfg.name is None else Path(cfg.name).expanduser() / PIXELS_FILE
    own = storage.read_json(str(file)) if file is not None and file.is_file() else {}
    half = (0.5, 0.5, 0.5)
    return {
        "mean": tuple(cfg.mean or own.get("image_mean") or half),
        "std": tuple(cfg.std or own.get("image_std") or half),
    }


def _side(cfg: HuggingFaceVisionConfig, config: Any) -> int:
    size = getattr(config, "image_size", None)
    if not isinstance(size, int):
        what = cfg.name or config.model_type
        raise ConfigError(f"{what} has the image_size {size}, but a tower reads square images of one size.")
    return size


@TOWERS.register(
    "huggingface_vision",
    "Vision towers of Hugging Face transformers, from a folder or from scratch.",
    paper="Transformers: State-of-the-Art Natural Language Processing",
)
class HuggingFaceVisionFamily(TowerFamily):
    """How Hugging Face's vision towers are configured, built and fed."""

    config = HuggingFaceVisionConfig

    @staticmethod
    def build(cfg: HuggingFaceVisionConfig, embed_dim: int) -> nn.Module:
        """A tower with the weights of `name`, or fresh ones."""
        config = read_config(cfg.name, cfg.config, "vision")
        _side(cfg, config)
        if cfg.pooling != "pooler" and hasattr(config, "vision_use_head"):
            config.vision_use_head = False
        net: Any = build_net(cfg.name, config, cfg.pretrained)
        if cfg.pooling != "pooler" and getattr(net, "pooler", None) is not None:
            net.pooler = None  # not used: its parameters would never get a gradient
        embeddings = getattr(net, "embeddings", None)
        if cfg.pooling == "cls" and not any(hasattr(embeddings, name) for name in ("cls_token", "class_embedding")):
            raise ConfigError(f"{cfg.name or config.model_type} has no class token: set pooling to pooler or mean.")
        constants = _pixels(cfg)
        tower = HuggingFaceVisionTower(
            net, Pixels(constants["mean"], constants["std"]), cfg.pooling, cfg.head, embed_dim
        )
        if cfg.name is not None and cfg.pretrained:
            load_projection_(tower.head, cfg.name, "visual")
        return tower

    @staticmethod
    def inputs(cfg: HuggingFaceVisionConfig, train: bool) -> ViewInput:
        """Images cropped to the tower's size."""
        side = _side(cfg, read_config(cfg.name, cfg.config, "vision"))
        return ImageInput(side, cfg.augment if train else None)

    @staticmethod
    def save_files(cfg: HuggingFaceVisionConfig, tower: nn.Module, folder: Path) -> None:
        """Keep the architecture and the constants of the pixels."""
        folder.mkdir(parents=True, exist_ok=True)
        tower.net.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        constants = _pixels(cfg)
        storage.write_json(
            str(folder / PIXELS_FILE), {"image_mean": list(constants["mean"]), "image_std": list(constants["std"])}
        )

    @staticmethod
    def restored(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Architecture and constants come from the folder, weights from the checkpoint."""
        return {**fields, "name": str(folder), "config": {}, "pretrained": False}
