"""Models of Hugging Face transformers, from a folder (or hub name) or from scratch by a config.

Weights are read from safetensors only and no code of a model's repository is run. Of a folder that holds a pair of
towers, such as CLIP's, a tower takes its own part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cl.encoders.attention import register_with_transformers
from cl.errors import ConfigError


def read_config(name: str | None, fields: dict[str, Any], part: Literal["text", "vision"]) -> Any:
    """The transformers config of `name` with `fields` over its own, or of `fields` alone.

    Raises:
        ConfigError: transformers does not know it, or `name` cannot be read.
    """
    from transformers import AutoConfig

    own = dict(fields)
    try:
        if name is None:
            return AutoConfig.for_model(own.pop("model_type"), **own)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        config = getattr(config, f"{part}_config", config)
        for field, value in own.items():
            if field != "model_type":
                setattr(config, field, value)
        return config
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
        what = f"{name} is not a model that transformers can read" if name else "config is not understood"
        raise ConfigError(f"{what}: {reason}.") from error


def build_net(name: str | None, config: Any, pretrained: bool) -> nn.Module:
    """The bare model of a config: with the weights of `name`, or fresh ones.

    Raises:
        ConfigError: it cannot be built.
    """
    from transformers import AutoModel

    kernel = register_with_transformers()
    try:
        if name is not None and pretrained:
            return AutoModel.from_pretrained(
                name,
                config=config,
                attn_implementation=kernel,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
            )
        return AutoModel.from_config(config, attn_implementation=kernel)
    except (OSError, ValueError, RuntimeError) as error:
        what = name or config.model_type
        raise ConfigError(f"{what} cannot be built: {' '.join(str(error).split())[:300]}") from error


def load_projection_(head: nn.Module, name: str, part: Literal["text", "visual"]) -> None:
    """Fill a linear head with the projection of a CLIP folder, where there is one of its shape."""
    from safetensors import safe_open

    file = Path(name).expanduser() / "model.safetensors"
    if not isinstance(head, nn.Linear) or not file.is_file():
        return
    with safe_open(file, framework="pt") as tensors:
        key = f"{part}_projection.weight"
        if key in tensors.keys() and tuple(tensors.get_slice(key).get_shape()) == tuple(head.weight.shape):  # noqa: SIM118 - not a mapping
            with torch.no_grad():
                head.weight.copy_(tensors.get_tensor(key))
