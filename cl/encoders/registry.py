"""The registry of tower families: what `family:` in a model config may say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from cl.encoders.config import TowerConfig
from cl.encoders.inputs import ViewInput
from cl.registry import Registry


class TowerFamily(ABC):
    """How one family of towers is configured, built and fed; never instantiated."""

    config: ClassVar[type[TowerConfig]]

    @staticmethod
    @abstractmethod
    def build(cfg: Any, embed_dim: int) -> nn.Module:
        """A tower with fresh (or its own pretrained) weights: input of a view -> [B, embed_dim], not normalised.

        The module has `load_external(tensors, where)` if it can read weights of other projects. One that gives more
        than the embedding returns a `cl.encoders.outputs.TowerOutputs` when called with `whole=True`, and has
        `has_features` (True) and `token_width` (V) if those are among it, and `words(inputs)`, token ids and mask, if
        its tokens are words. `follow_(clock)` is called before each step of a run.
        """

    @staticmethod
    @abstractmethod
    def inputs(cfg: Any, train: bool) -> ViewInput:
        """What turns a view's raw samples (bytes, strings) into the tower's input; picklable."""

    @staticmethod  # noqa: B027 - most towers need none
    def save_files(cfg: Any, tower: nn.Module, folder: Path) -> None:
        """Write what must lie beside the weights to rebuild the tower elsewhere: architecture, tokenizer."""

    @staticmethod
    def restored(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The config fields of a tower whose files were saved in `folder`."""
        return fields


TOWERS: Registry[type[TowerFamily]] = Registry("tower", "cl.encoders.towers", "clew.towers")
