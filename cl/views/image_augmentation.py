"""Augmentation of pictures: crop, mirror, colour jitter, grey, blur, solarisation, in this order.

Each step happens with a probability of its own, as in Chen et al. 2020, "A Simple Framework for Contrastive Learning
of Visual Representations", appendix A, and in all that followed it; the published sets of values are in
`cl.views.augmentations`. torchvision's functions do the work; what they would draw from torch's global generator is
drawn here from the seed.
"""

from __future__ import annotations

from typing import ClassVar

from PIL import Image, ImageFilter
from pydantic import Field, model_validator

from cl.views.augmentation import Augmentation
from cl.views.draws import uniforms

_FLIP, _COLOUR = 0x5851F42D4C957F2D, 0x2545F4914F6CDD1D  # streams of their own beside that of the crop
_GREY_LEVELS = 256


class ImageAugmentation(Augmentation):
    """What is drawn for a training picture; by default, as in CLIP, a crop of almost all of it."""

    modality: ClassVar[str] = "image"

    name: str = "weak"
    scale: tuple[float, float] | None = Field(
        (0.9, 1.0), description="share of the area the crop covers, from and to; null: the centre crop"
    )
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="width / height of the crop, from and to")
    flip: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of a mirror image; 0 where captions name sides",
    )
    jitter: float = Field(0.0, ge=0, le=1, description="probability of the colour jitter")
    brightness: float = Field(0.0, ge=0, description="the factor is drawn from 1 - this to 1 + this, not below 0")
    contrast: float = Field(0.0, ge=0, description="likewise")
    saturation: float = Field(0.0, ge=0, description="likewise")
    hue: float = Field(0.0, ge=0, le=0.5, description="shift in turns of the colour circle, from minus this to this")
    grey: float = Field(0.0, ge=0, le=1, description="probability that the picture loses its colours")
    blur: float = Field(0.0, ge=0, le=1, description="probability of a Gaussian blur")
    sigma: tuple[float, float] = Field((0.1, 2.0), description="standard deviation of the blur in pixels, from and to")
    solarise: float = Field(0.0, ge=0, le=1, description="probability that all bytes from `threshold` on are inverted")
    threshold: int = Field(128, ge=0, le=_GREY_LEVELS, description="of the solarisation")

    @model_validator(mode="after")
    def _ranges(self) -> ImageAugmentation:
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must rise within (0, 1], not {list(self.scale)}")
        for name in ("ratio", "sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must rise from a number above 0, not {[low, high]}")
        return self

    def apply(self, picture: Image.Image, seed: int) -> Image.Image:
        """Everything but the crop (`cl.views.images.crop_box`) on an RGB picture; the seed fixes the result."""
        if self.flip and uniforms(seed ^ _FLIP, 1)[0] < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if not (self.jitter or self.grey or self.blur or self.solarise):
            return picture
        from torchvision.transforms.v2 import functional

        jitter, grey, blur, width, solarise, *strengths = uniforms(seed ^ _COLOUR, 13)
        if jitter < self.jitter:
            picture = self._jitter(picture, strengths[:4], strengths[4:])
        if grey < self.grey:
            picture = functional.rgb_to_grayscale(picture, num_output_channels=3)
        if blur < self.blur:  # Pillow's, as in the code of MoCo and DINO: a seventh of the time of torchvision's
            sigma = self.sigma[0] + width * (self.sigma[1] - self.sigma[0])
            picture = picture.filter(ImageFilter.GaussianBlur(sigma))
        if solarise < self.solarise:
            picture = functional.solarize(picture, self.threshold)
        return picture

    def _jitter(self, picture: Image.Image, strengths: list[float], order: list[float]) -> Image.Image:
        """Brightness, contrast, saturation and hue by `strengths`, in the order of the numbers in `order`."""
        from torchvision.transforms.v2 import functional

        steps = [
            (functional.adjust_brightness, self.brightness),
            (functional.adjust_contrast, self.contrast),
            (functional.adjust_saturation, self.saturation),
            (functional.adjust_hue, self.hue),
        ]
        for number in sorted(range(4), key=lambda step: order[step]):
            adjust, width = steps[number]
            if width == 0:
                continue
            middle = 0.0 if adjust is functional.adjust_hue else 1.0
            low = middle - width if middle == 0 else max(middle - width, 0.0)
            picture = adjust(picture, low + strengths[number] * (middle + width - low))
        return picture
