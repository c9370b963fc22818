"""How long a run is, and where in it a step is."""

from __future__ import annotations

from dataclasses import dataclass

from cl.pairs import Clock


@dataclass(frozen=True)
class RunLength:
    """The length of a run.

    Attributes:
        steps: optimizer steps of the whole run.
        steps_per_epoch: those of one pass over the corpora.
        samples_per_epoch: samples of the corpora.
        batch_size: samples of a step's global batch; the last one of an epoch may hold fewer.
    """

    steps: int
    steps_per_epoch: int
    samples_per_epoch: int
    batch_size: int

    def clock(self, epoch: int, step: int) -> Clock:
        """Where step `step` of epoch `epoch` is, both from 0."""
        epochs = -(-self.steps // self.steps_per_epoch)
        return Clock(epoch * self.steps_per_epoch + step, self.steps, epoch, epochs)

    def done(self, steps: int) -> tuple[int, int]:
        """Complete epochs and positions of the corpora consumed after `steps` steps."""
        epoch, within = divmod(steps, self.steps_per_epoch)
        return epoch, epoch * self.samples_per_epoch + min(within * self.batch_size, self.samples_per_epoch)
