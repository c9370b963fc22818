"""The registry of tower families: what `family:` in a model config may say."""

from __future__ import annotations

from abc import ABC, abstractmethod
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

        The module has `load_external(tensors, where)` if it can read weights of other projects, and
        `save_files(folder)` if it needs files beside its weights to be rebuilt.
        """

    @staticmethod
    @abstractmethod
    def inputs(cfg: Any, train: bool) -> ViewInput:
        """What turns a view's raw samples (bytes, strings) into the tower's input; picklable."""


TOWERS: Registry[type[TowerFamily]] = Registry("tower", "cl.encoders.towers", "clew.towers")
