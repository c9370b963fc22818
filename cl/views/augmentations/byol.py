"""BYOL's two augmentations, which differ: the first always blurs, the second seldom does and solarises.

Grill et al. 2020, "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", appendix B, table 6. MoCo
v3, Barlow Twins and VICReg take the same pair.
"""

from __future__ import annotations

from cl.views.augmentation import AUGMENTATIONS
from cl.views.image_augmentation import ImageAugmentation

PAPER = "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning"

BYOL = AUGMENTATIONS.register("byol-1", "crops, mirror, jitter, grey, always blurred", PAPER)(
    ImageAugmentation(
        name="byol-1",
        scale=(0.08, 1.0),
        flip=0.5,
        jitter=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        grey=0.2,
        blur=1.0,
    )
)
AUGMENTATIONS.register("byol-2", "crops, mirror, jitter, grey, seldom blurred, at times solarised", PAPER)(
    BYOL.model_copy(update={"name": "byol-2", "blur": 0.1, "solarise": 0.2})
)
