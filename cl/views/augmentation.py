"""What an augmentation is, and the registry of those that a config can name.

    augment: simclr                              as it is registered
    augment: {name: simclr, scale: [0.5, 1.0]}   with other values of some of its fields

What is registered is an instance: the named augmentation with its published settings. It draws from the seed it is
given and from nothing else, so the same sample gets the same augmentation on any worker and thread, resumed or not.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, SerializeAsAny

from cl.config import Config, parse_config
from cl.errors import ConfigError
from cl.registry import Registry


class Augmentation(Config):
    """Base of all augmentations: `cl.views.image_augmentation.ImageAugmentation`, `cl.views.texts.TextAugmentation`."""

    modality: ClassVar[str]  # image or text

    name: str = Field(description="as registered: `simclr`, `span`, ... or one of your own package")


AUGMENTATIONS: Registry[Augmentation] = Registry("augmentation", "cl.views.augmentations", "clew.augmentations")


def named(value: Any) -> Any:
    """The registered augmentation of that name, with the fields that are given in place of its own."""
    if isinstance(value, Augmentation):
        return value
    fields = {"name": value} if isinstance(value, str) else value
    if not isinstance(fields, dict) or "name" not in fields:
        raise ValueError("an augmentation is a name such as simclr, or a mapping with the field name")
    try:
        registered = AUGMENTATIONS[str(fields["name"])]
        own = {**registered.model_dump(), **fields}
        return parse_config(type(registered), own, where=f"augmentation {registered.name!r}")
    except ConfigError as error:
        raise ValueError(str(error)) from error  # so that the error says which field it is


AnyAugmentation = Annotated[SerializeAsAny[Augmentation], BeforeValidator(named)]
