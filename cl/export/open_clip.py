"""To open_clip: `open_clip_config.json` and `open_clip_model.safetensors` in one folder.

    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
    tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")

Embeddings of the same pixels and words are the same. open_clip's `preprocess` decodes and resizes by torchvision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cl import storage
from cl.encoders.tokenizers import CLIP_VOCABULARY
from cl.encoders.towers.open_clip import OpenClipConfig, tower_cfg
from cl.errors import ConfigError
from cl.export.run import Trained
from cl.export.tokenizer import save_tokenizer


def write(trained: Trained, folder: Path) -> str:
    """Write the folder; returns how it is loaded.

    Raises:
        ConfigError: the model is not one vision and one text tower of open_clip.
    """
    image, text = _tower(trained, "vision"), _tower(trained, "text")
    configs = [trained.config.towers[name] for name in (image, text)]
    (vision_cfg, quick), (text_cfg, quick_text) = (tower_cfg(config) for config in configs)  # type: ignore[arg-type]
    if quick != quick_text:
        raise ConfigError("open_clip has one quick_gelu for both towers, but these two towers differ in it.")
    vision, words = asdict(vision_cfg), asdict(text_cfg)
    vision |= {"patch_dropout": 0.0, "output_tokens": False}
    words |= {"output_tokens": False, **_tokenizer(trained, text, text_cfg, folder)}
    scales = _scales(trained.objective)
    vision, words = ({key: value for key, value in each.items() if value is not None} for each in (vision, words))
    model: dict[str, Any] = {
        "embed_dim": trained.config.embed_dim,
        "vision_cfg": vision,
        "text_cfg": words,
        "quick_gelu": quick,
        "custom_text": True,
        **({"init_logit_bias": -10} if "logit_bias" in scales else {}),
    }
    config = configs[0]
    assert isinstance(config, OpenClipConfig)
    pixels = {"mean": list(config.mean), "std": list(config.std), "interpolation": "bicubic", "resize_mode": "shortest"}
    storage.write_json(str(folder / "open_clip_config.json"), {"model_cfg": model, "preprocess_cfg": pixels})
    tensors = {f"visual.{name}": value for name, value in _net(trained, image).items()}
    if not config.projection:  # open_clip always has one
        tensors["visual.proj"] = torch.eye(trained.config.embed_dim)
    tensors |= {f"text.{name}": value for name, value in _net(trained, text).items()}
    whole = {name: value.contiguous() for name, value in (tensors | scales).items()}
    save_file(whole, folder / "open_clip_model.safetensors", {"format": "pt"})
    return 'open_clip.create_model_and_transforms("local-dir:{}")'


def _tower(trained: Trained, part: str) -> str:
    """The name of the one open_clip tower of that part."""
    towers = trained.config.towers
    found = [name for name, tower in towers.items() if isinstance(tower, OpenClipConfig) and tower.part == part]
    if len(found) != 1 or len(towers) != 2:
        what = ", ".join(f"{name} ({tower.family})" for name, tower in towers.items())
        raise ConfigError(f"open_clip holds one vision and one text tower of its own, but this model has {what}.")
    return found[0]


def _net(trained: Trained, tower: str) -> Mapping[str, Tensor]:
    return trained.model.towers[tower].net.state_dict()  # type: ignore[union-attr]


def _tokenizer(trained: Trained, tower: str, text_cfg: Any, folder: Path) -> dict[str, Any]:
    """Fields of text_cfg that say which tokenizer; one that open_clip does not have is written beside the weights."""
    config = trained.config.towers[tower]
    assert isinstance(config, OpenClipConfig)
    if config.tokenizer is None and text_cfg.vocab_size == CLIP_VOCABULARY:
        return {}
    view = next(view for view, reader in trained.config.readers.items() if reader == tower)
    tokenizer = trained.inputs.text(view).tokenizer
    if tokenizer.clean and (text_cfg.no_causal_mask or text_cfg.embed_cls):
        raise ConfigError(
            "The text tower sees padding, which is the word 0 of CLIP's cut vocabulary: open_clip's tokenizers cannot "
            "say that. Train with vocab_size 49408 or a tokenizer of its own."
        )
    save_tokenizer(tokenizer, folder)
    # Any name but an empty one: open_clip takes the files of the folder.
    kwargs = {"clean": "lower"} if tokenizer.clean else {"clean": "whitespace"}
    return {"hf_tokenizer_name": "local", "tokenizer_kwargs": kwargs}


def _scales(objective: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """logit_scale (and logit_bias) as trained, or open_clip's own start where the objective has none or several."""
    found = [value for name, value in objective.items() if name.endswith("temperature.log_scale")]
    scale = found[0].float() if len(found) == 1 else torch.tensor(math.log(1 / 0.07))
    bias = objective.get("bias")
    return {"logit_scale": scale, **({"logit_bias": bias.float()} if bias is not None and bias.dim() == 0 else {})}
