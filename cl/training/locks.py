"""Locked towers: what is not trained, or not yet.

    locked:
      image: {}                                                              # as it came, all of the run (LiT)
      text: {trained_layers: {start: 1, end: 14, begin: 0.1, finish: 0.5}}   # opened from the top, layer by layer

Zhai et al. 2022, "LiT: Zero-Shot Transfer with Locked-image text Tuning"; opened layer by layer it is the gradual
unfreezing of Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification". Layers count from
the top: 1 is what follows the last block (norm and projection), 2 adds the last block, and so on to the embeddings. A
tower that is locked as a whole runs in evaluation mode. What is locked is a function of the step, so a run resumes.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, field_validator
from torch import nn

from cl.config import Config
from cl.encoders import EncoderModel
from cl.objectives.schedule import Ramp, Scheduled, value_at
from cl.pairs import Clock
from cl.training.optimizer import layers_above


class LockConfig(Config):
    """How much of a tower is trained."""

    trained_layers: Scheduled = Field(
        0, description="layers from the top that are trained all the same, a number or a ramp over the run"
    )

    @field_validator("trained_layers")
    @classmethod
    def _not_negative(cls, value: Scheduled) -> Scheduled:
        if min((value.start, value.end) if isinstance(value, Ramp) else (value,)) < 0:
            raise ValueError(f"a number of layers must not be negative, but is {value}")
        return value

    @property
    def most(self) -> int:
        """The most layers that are ever trained."""
        layers = self.trained_layers
        return int(max(layers.start, layers.end) if isinstance(layers, Ramp) else layers)


class Locks:
    """Locks towers of a model; those of its parameters that are trained at any time of the run stay open at first.

    Args:
        configs: tower -> how much of it is trained.
        model: before it is sharded, and before the optimizer is built.
    """

    def __init__(self, configs: Mapping[str, LockConfig], model: EncoderModel) -> None:
        self.configs, self.model = dict(configs), model
        self.fixed = {name for name, parameter in _parameters(model) if not parameter.requires_grad}
        self.layers = {name: config.most for name, config in self.configs.items()}
        for name, layers in self.layers.items():
            self._open(name, layers)

    def set_(self, clock: Clock) -> bool:
        """Lock and open what is due at a step; True if anything changed, so that a wrapper must look again."""
        # A ramp reaches a whole number of layers but for rounding.
        due = {name: int(value_at(config.trained_layers, clock) + 1e-6) for name, config in self.configs.items()}
        changed = {name: layers for name, layers in due.items() if layers != self.layers[name]}
        for name, layers in changed.items():
            self._open(name, layers)
        self.layers = due
        return bool(changed)

    def still_(self) -> None:
        """Put the towers that are locked as a whole into evaluation mode; after every `train()`."""
        for name, layers in self.layers.items():
            if layers == 0:
                self.model.towers[name].eval()

    def _open(self, tower: str, layers: int) -> None:
        named = [(name, p) for name, p in _parameters(self.model) if name.startswith(f"towers.{tower}.")]
        above = layers_above([name for name, _ in named])
        for name, parameter in named:
            parameter.requires_grad_(name not in self.fixed and above.get(name, 0) < layers)


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names as they are without the wrappers of activation checkpointing."""
    return [(name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters()]
