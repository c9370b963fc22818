"""SimCLR's augmentation and MoCo's variant of it.

Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", appendix A, with jitter
strength s = 1: factors 0.8 s, hue 0.2 s. Chen et al. 2020, "Improved Baselines with Momentum Contrastive Learning",
section 2: larger crops, half of the jitter.
"""

from __future__ import annotations

from cl.views.augmentation import AUGMENTATIONS
from cl.views.image_augmentation import ImageAugmentation

SIMCLR = AUGMENTATIONS.register(
    "simclr",
    "crops of 8 to 100 %, mirror, strong jitter, grey, blur",
    "A Simple Framework for Contrastive Learning of Visual Representations",
)(
    ImageAugmentation(
        name="simclr",
        scale=(0.08, 1.0),
        flip=0.5,
        jitter=0.8,
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        grey=0.2,
        blur=0.5,
    )
)

AUGMENTATIONS.register(
    "moco-v2",
    "crops of 20 to 100 %, mirror, jitter, grey, blur",
    "Improved Baselines with Momentum Contrastive Learning",
)(
    SIMCLR.model_copy(
        update={
            "name": "moco-v2",
            "scale": (0.2, 1.0),
            "brightness": 0.4,
            "contrast": 0.4,
            "saturation": 0.4,
            "hue": 0.1,
        }
    )
)
