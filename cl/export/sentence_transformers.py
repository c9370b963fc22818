"""To sentence-transformers: the transformer, then pooling, the head as dense layers, and scaling to length 1.

The files are those that version 2 to 6 of the library read; the folder is one of Hugging Face as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from cl import storage
from cl.errors import ConfigError
from cl.export.huggingface import save_transformer, text_tower
from cl.export.run import Trained

_POOLING = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}


def write(trained: Trained, folder: Path) -> str:
    """Write the folder; returns how it is loaded.

    Raises:
        ConfigError: the model has no text tower of Hugging Face.
    """
    name, config, tower = text_tower(trained)
    if config.pooling == "latent" or config.bidirectional:
        what = "latent attention" if config.pooling == "latent" else "bidirectional attention of a decoder"
        raise ConfigError(f"The tower {name!r} has {what}, for which sentence-transformers has no module.")
    save_transformer(trained, folder)
    limits = {"max_seq_length": config.max_tokens, "do_lower_case": False}
    storage.write_json(str(folder / "sentence_bert_config.json"), limits)
    pooling = {mode: mode == _POOLING[config.pooling] for mode in _POOLING.values()}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _json(folder / "1_Pooling", {"word_embedding_dimension": tower.token_width, **pooling})
    layers = [*tower.head] if isinstance(tower.head, nn.Sequential) else [tower.head]
    for number, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            place = f"{len(modules)}_Dense"
            followed = number + 1 < len(layers)
            _dense(folder / place, layer, type(layers[number + 1]) if followed else nn.Identity)
            modules.append((place, "Dense"))
    (folder / f"{len(modules)}_Normalize").mkdir()
    modules.append((f"{len(modules)}_Normalize", "Normalize"))
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(modules)
    ]
    storage.write_json(str(folder / "modules.json"), listed)
    storage.write_json(
        str(folder / "config_sentence_transformers.json"), {"prompts": {}, "similarity_fn_name": "cosine"}
    )
    return 'sentence_transformers.SentenceTransformer("{}")'


def _dense(folder: Path, layer: nn.Linear, activation: type[nn.Module]) -> None:
    fields = {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "activation_function": f"{activation.__module__}.{activation.__qualname__}",
    }
    _json(folder, fields)
    tensors = {f"linear.{name}": value.detach().contiguous() for name, value in layer.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _json(folder: Path, fields: dict[str, Any]) -> None:
    folder.mkdir()
    storage.write_json(str(folder / "config.json"), fields)
