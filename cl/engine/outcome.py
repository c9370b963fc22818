"""What evaluating an objective gives."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """What an objective makes of a batch.

    Attributes:
        loss: 0-d; the value is the loss of the global batch and the same on every worker. `backward` deposits
            gradients that are exact after the wrapper averages them (see `cl.engine.collectives`).
        metrics: name -> detached 0-d tensor of the global batch, for the log.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
