"""Multi-crop: two large views and some small ones of the same picture, each read at its own size.

    image_1: {tower: image, of: image, augment: dino-global-1}
    image_2: {tower: image, of: image, augment: dino-global-2}
    crop: {tower: image, of: image, augment: dino-local, size: 96, copies: 8} # crop_1 ... crop_8

Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", section 3.3 and
appendix A. Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", section 3.2 and the
published code: crops above and below 0.4 of the area, with BYOL's colours.
"""

from __future__ import annotations

from cl.views.augmentation import AUGMENTATIONS
from cl.views.augmentations.byol import BYOL
from cl.views.augmentations.simclr import SIMCLR

SWAV = "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"
DINO = "Emerging Properties in Self-Supervised Vision Transformers"

for _name, _summary, _paper, _base, _changes in (
    ("swav-global", "SimCLR's colours on crops of 14 to 100 %", SWAV, SIMCLR, {"scale": (0.14, 1.0)}),
    ("swav-local", "SimCLR's colours on crops of 5 to 14 %", SWAV, SIMCLR, {"scale": (0.05, 0.14)}),
    ("dino-global-1", "crops of 40 to 100 %, always blurred", DINO, BYOL, {"scale": (0.4, 1.0)}),
    (
        "dino-global-2",
        "crops of 40 to 100 %, seldom blurred, at times solarised",
        DINO,
        BYOL,
        {"scale": (0.4, 1.0), "blur": 0.1, "solarise": 0.2},
    ),
    ("dino-local", "crops of 5 to 40 %, half of them blurred", DINO, BYOL, {"scale": (0.05, 0.4), "blur": 0.5}),
):
    AUGMENTATIONS.register(_name, _summary, _paper)(_base.model_copy(update={"name": _name, **_changes}))
