"""One training step's forward pass: towers, then objective, as one module.

A wrapper such as DDP therefore sees every parameter, those of the objective included, and averages them all; that is
what the objectives' gradient convention expects (`cl.engine.collectives`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cl.batches.loader import Batch
from cl.encoders import EncoderModel
from cl.engine.collectives import Workers
from cl.errors import ConfigError
from cl.objectives import Objective
from cl.pairs import Pairs
from cl.training.config import Precision
from cl.training.precision import autocast


class StepOutput(NamedTuple):
    """What the forward pass of a step gives.

    Attributes:
        loss: 0-d, the global loss; its gradients follow the engine's convention.
        metrics: name -> detached 0-d tensor.
        finite: bool [B], whether all of a sample's embeddings are finite; masked samples count as finite.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    finite: Tensor


class TrainStep(nn.Module):
    """Towers and objective.

    Args:
        model: gives normalised embeddings [B, D] by view.
        objective: built by `build_objective`.
        workers: those that share negatives.
        precision: that of the towers; the objective computes in float32 or float64.
    """

    def __init__(self, model: EncoderModel, objective: Objective, workers: Workers, precision: Precision) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.workers, self.precision = workers, precision

    def forward(self, batch: Batch) -> StepOutput:
        weight = batch.weight
        with autocast(self.precision, weight.device):
            views = self.model(batch.views)
        finite = torch.stack([view.detach().isfinite().all(dim=1) for view in views.values()]).all(dim=0)
        pairs = Pairs(views=views, ids=batch.ids, content=batch.content, weight=weight)
        outcome = self.objective(pairs, self.workers)
        return StepOutput(outcome.loss, outcome.metrics, finite | (weight == 0))


def wrap(step: TrainStep, device: torch.device) -> nn.Module:
    """Average gradients over the workers with DDP; a process alone needs no wrapper.

    The graph is the same at every step, which also lets DDP pass over parameters that a tower has but does not use.

    Raises:
        ConfigError: batch norms whose statistics the workers cannot share.
    """
    if step.workers.size == 1:
        return step
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in step.modules()):
        if device.type != "cuda":
            raise ConfigError(
                "The model has batch norms, whose statistics only workers on GPUs can share: train it with one worker."
            )
        step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
    return DistributedDataParallel(
        step,
        process_group=step.workers.group,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=True,
    )
