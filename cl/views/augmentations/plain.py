"""The centre of a picture, and almost all of it."""

from __future__ import annotations

from cl.views.augmentation import AUGMENTATIONS
from cl.views.image_augmentation import ImageAugmentation

AUGMENTATIONS.register("none", "the centre crop, as in evaluation")(ImageAugmentation(name="none", scale=None))
AUGMENTATIONS.register(
    "weak", "a crop of 90 to 100 % of the area", "Learning Transferable Visual Models From Natural Language Supervision"
)(ImageAugmentation())
