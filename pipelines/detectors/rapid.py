"""Text detection by RapidOCR: the detector of PP-OCRv4 on ONNX Runtime, with its weights in the package."""

from __future__ import annotations

import numpy as np

from cl.errors import ConfigError
from pipelines.detectors.registry import TEXT_DETECTORS

MARGIN = 0.2  # of a line's height, on every side: the detector's boxes cut strokes


@TEXT_DETECTORS.register("rapidocr", "PP-OCRv4's text detector on the CPU: pip install rapidocr-onnxruntime")
class RapidText:
    """Differentiable binarization (Liao et al. 2020); texts are found, not read."""

    def __init__(self) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ConfigError("The text detector 'rapidocr' needs another package: pip install 'clew[ocr]'.") from error
        self.detect = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        found, _ = self.detect(np.ascontiguousarray(pixels[..., ::-1]), use_det=True, use_cls=False, use_rec=False)
        corners = np.array(found if found is not None else np.zeros((0, 4, 2)), np.float64).reshape(-1, 4, 2)
        height, width = pixels.shape[:2]
        low, high = corners.min(1), corners.max(1)
        margin = MARGIN * (high - low).min(1, keepdims=True)
        low = np.maximum(np.floor(low - margin), 0)
        high = np.minimum(np.ceil(high + margin) + 1, [width, height])
        return np.concatenate([low, high], 1).astype(np.int64)
