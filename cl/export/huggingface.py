"""To Hugging Face: a text tower of transformers as `AutoModel` and `AutoTokenizer` read it.

The format holds token states; pooling them is left to the user, and a head has no place in it (`sentence-transformers`
has one for both).
"""

from __future__ import annotations

from pathlib import Path

from cl.encoders.towers.huggingface import HuggingFaceConfig, HuggingFaceTower
from cl.errors import ConfigError
from cl.export.run import Trained
from cl.export.tokenizer import save_tokenizer


def write(trained: Trained, folder: Path) -> str:
    """Write the folder; returns how it is loaded.

    Raises:
        ConfigError: the model has no text tower of Hugging Face, or one with a head.
    """
    name, config, _ = text_tower(trained)
    if config.head != "none":
        raise ConfigError(
            f"The tower {name!r} ends in a {config.head} head, for which this format has no place: export to "
            "sentence-transformers, whose folder AutoModel reads as well."
        )
    if config.pooling == "latent":
        raise ConfigError(f"The tower {name!r} pools by latent attention, for which this format has no place.")
    save_transformer(trained, folder)
    return 'transformers.AutoModel.from_pretrained("{}")' + f"  # pooling: {config.pooling}"


def text_tower(trained: Trained) -> tuple[str, HuggingFaceConfig, HuggingFaceTower]:
    """The one text tower of Hugging Face: its name, config and module."""
    towers = trained.config.towers
    found = [(name, tower) for name, tower in towers.items() if isinstance(tower, HuggingFaceConfig)]
    if len(found) != 1:
        what = ", ".join(f"{name} ({tower.family})" for name, tower in towers.items())
        raise ConfigError(f"The format holds one text tower of the family huggingface, but this model has {what}.")
    name, config = found[0]
    tower = trained.model.towers[name]
    assert isinstance(tower, HuggingFaceTower)
    return name, config, tower


def save_transformer(trained: Trained, folder: Path) -> None:
    """Weights, architecture and tokenizer of the text tower."""
    name, _, tower = text_tower(trained)
    tower.net.save_pretrained(folder)  # type: ignore[operator]
    view = next(view for view, reader in trained.config.readers.items() if reader == name)
    save_tokenizer(trained.inputs.text(view).tokenizer, folder)
