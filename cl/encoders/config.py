"""What a model is made of: towers by name, and which tower reads which view of a pair.

    model:
      embed_dim: 128
      towers:
        image: {family: open_clip, part: vision, config: {image_size: 64, patch_size: 8, width: 128, layers: 4}}
        text: {family: open_clip, part: text, config: {vocab_size: 8192, context_length: 32, width: 128, layers: 3}}
      views: {image: image, text: text}

Two views may share a tower: text pairs read `views: {anchor: text, positive: text}`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from cl.config import Config


class TowerConfig(Config):
    """Base of every tower family's config; `family` is the name in the registry of towers."""

    family: str = Field(description="name in the registry of towers: open_clip, huggingface or one of your own package")


def _by_family(value: Any) -> Any:
    """Validate a tower with the config model of its family."""
    if isinstance(value, TowerConfig):
        return value
    if not isinstance(value, dict) or "family" not in value:
        raise ValueError("a tower is a mapping with the field family, such as {family: open_clip, part: vision}")
    from cl.encoders.registry import TOWERS

    return TOWERS[str(value["family"])].config.model_validate(value)


AnyTower = Annotated[SerializeAsAny[TowerConfig], BeforeValidator(_by_family)]


class ModelConfig(Config):
    """A set of towers that map the views of a sample into one space of `embed_dim` dimensions."""

    embed_dim: int = Field(128, gt=0, description="dimensions of the shared space")
    towers: dict[str, AnyTower] = Field(description="tower name -> tower")
    views: dict[str, str] = Field(description="view name -> tower name; two views may share a tower")
    weights: str | None = Field(
        None, description="weights to start from: a Clew checkpoint or run folder, an open_clip .safetensors file"
    )

    @model_validator(mode="after")
    def _views_name_towers(self) -> ModelConfig:
        if not self.views:
            raise ValueError("views must name at least one view")
        for view, tower in self.views.items():
            if tower not in self.towers:
                raise ValueError(f"view {view!r} names tower {tower!r}, but the towers are {', '.join(self.towers)}")
        idle = set(self.towers) - set(self.views.values())
        if idle:
            raise ValueError(f"tower {min(idle)!r} is read by no view")
        return self
