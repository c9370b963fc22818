"""The registry of text detectors: Clew's own, and a user's through the entry points `clew.text_detectors`.

A detector is a class without arguments to its constructor, which may load a model; an instance is called with one
picture, uint8 [H, W, 3], and returns boxes around its texts, int [n, 4]: left, top, right and bottom in pixels, the
last two exclusive. The same picture must give the same boxes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cl.registry import Registry


class TextDetector(Protocol):
    """What an instance of a registered class is."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray: ...


TEXT_DETECTORS: Registry[type[TextDetector]] = Registry(
    kind="text detector", package="pipelines.detectors", group="clew.text_detectors"
)
