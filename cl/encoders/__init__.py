"""Encoders: towers that map the views of a sample into one space.

`build_model` and `build_inputs` make a model and what feeds it from a `ModelConfig`; `save_model` and
`load_checkpoint_model` keep them on disk. Imported on first use: torch and open_clip are slow to start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cl.encoders.config import ModelConfig

if TYPE_CHECKING:
    from cl.encoders.checkpoint import load_checkpoint_model, save_model
    from cl.encoders.inputs import Inputs
    from cl.encoders.model import EncoderModel, build_inputs, build_model

__all__ = [
    "EncoderModel",
    "Inputs",
    "ModelConfig",
    "build_inputs",
    "build_model",
    "load_checkpoint_model",
    "save_model",
]

_HOMES = {
    "EncoderModel": "model",
    "Inputs": "inputs",
    "build_inputs": "model",
    "build_model": "model",
    "load_checkpoint_model": "checkpoint",
    "save_model": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"cl.encoders.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
