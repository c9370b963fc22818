"""What a model is made of: towers by name, and which tower reads which view of a pair.

    model:
      embed_dim: 128
      towers:
        image: {family: open_clip, part: vision, config: {image_size: 64, patch_size: 8, width: 128, layers: 4}}
        text: {family: open_clip, part: text, config: {vocab_size: 8192, context_length: 32, width: 128, layers: 3}}
      views: {image: image, text: text}

Two views may share a tower: text pairs read `views: {anchor: text, positive: text}`. Several views may show the same
field of a sample, each with an augmentation of its own:

      views:
        image: image
        image_strong: {tower: image, of: image, augment: simclr}
        crop: {tower: image, of: image, augment: dino-local, size: 32, copies: 6} # crop_1 ... crop_6
        text: text
        text_again: {tower: text, of: text} # the same words; the tower's dropout makes the difference

A view gives its embedding; `outputs` asks for more (`cl.encoders.outputs`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from cl.config import Config
from cl.encoders.outputs import OutputKind, output_name
from cl.views.augmentation import AnyAugmentation


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


class ViewConfig(Config):
    """One view of a sample, or several that differ only in what was drawn for them."""

    tower: str = Field(description="name of the tower that reads it")
    of: str | None = Field(
        None, description="the sample's field it shows: image, text, anchor or positive; null: that of the view's name"
    )
    augment: AnyAugmentation | None = Field(
        None, description="of training samples: a registered name, or {name: ..., field: ...}; null: as the tower says"
    )
    size: int | None = Field(None, gt=0, description="side of the picture in pixels; null: the tower's own")
    copies: int = Field(1, ge=1, description="views of this kind; more than one are called NAME_1, NAME_2, ...")
    outputs: list[OutputKind] = Field(
        ["embedding"],
        min_length=1,
        description="what the objective sees of it: embedding (NAME), features (NAME_features), tokens (NAME_tokens)",
    )


def _plain_view(value: Any) -> Any:
    """`view: tower` is short for `view: {tower: tower}`."""
    return {"tower": value} if isinstance(value, str) else value


class ModelConfig(Config):
    """A set of towers that map the views of a sample into one space of `embed_dim` dimensions."""

    embed_dim: int = Field(128, gt=0, description="dimensions of the shared space")
    towers: dict[str, AnyTower] = Field(description="tower name -> tower")
    views: dict[str, Annotated[ViewConfig, BeforeValidator(_plain_view)]] = Field(
        description="view name -> tower name, or a view; views may share a tower and show the same field"
    )
    weights: str | dict[str, str] | None = Field(
        None,
        description="weights to start from: a Clew checkpoint or run folder, an open_clip .safetensors file; or a "
        "mapping from some of the towers to where each comes from",
    )

    @model_validator(mode="after")
    def _views_name_towers(self) -> ModelConfig:
        if not self.views:
            raise ValueError("views must name at least one view")
        for name, view in self.views.items():
            if view.tower not in self.towers:
                raise ValueError(
                    f"view {name!r} names tower {view.tower!r}, but the towers are {', '.join(self.towers)}"
                )
        idle = set(self.towers) - {view.tower for view in self.views.values()}
        if idle:
            raise ValueError(f"tower {min(idle)!r} is read by no view")
        if len(self.each_view) < sum(view.copies for view in self.views.values()):
            raise ValueError("two views have the same name: copies of a view are called NAME_1, NAME_2, ...")
        names = [output for outputs in self.outputs.values() for output in outputs.values()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two views give an output of the name {twice[0]!r}")
        for name in self.weights if isinstance(self.weights, dict) else ():
            if name not in self.towers:
                raise ValueError(f"weights name the tower {name!r}, but the towers are {', '.join(self.towers)}")
        return self

    @property
    def each_view(self) -> dict[str, ViewConfig]:
        """Every single view by name, with its field filled in."""
        found = {}
        for name, view in self.views.items():
            filled = view.model_copy(update={"of": view.of or name, "copies": 1})
            names = [name] if view.copies == 1 else [f"{name}_{number}" for number in range(1, view.copies + 1)]
            found.update(dict.fromkeys(names, filled))
        return found

    @property
    def readers(self) -> dict[str, str]:
        """Tower name by view and by field: outside of training, a field is read by the tower of its first view."""
        views = {name: view.tower for name, view in self.each_view.items()}
        fields = {str(view.of): view.tower for view in reversed(self.each_view.values())}
        return {**fields, **views}

    @property
    def outputs(self) -> dict[str, dict[str, str]]:
        """View -> kind -> name in the batch, of everything that each view gives."""
        return {
            name: {kind: output_name(name, kind) for kind in get_args(OutputKind) if kind in view.outputs}
            for name, view in self.each_view.items()
        }

    def of_views(self, views: Iterable[str]) -> ModelConfig:
        """The part of the model that reads these views (names as in `each_view`)."""
        kept = {name: self.each_view[name] for name in views}
        towers = {name: tower for name, tower in self.towers.items() if name in {view.tower for view in kept.values()}}
        return self.model_copy(update={"views": kept, "towers": towers})
