"""One training step's forward pass: towers and teachers, then objective, as one module.

A wrapper such as DDP therefore sees every parameter, those of the objective included, and averages them all; that is
what the objectives' gradient convention expects (`cl.engine.collectives`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cl.batches.batch import Batch, Further
from cl.encoders import EncoderModel
from cl.encoders.teacher import Teacher, teacher_view
from cl.engine.cache import CachedBatch
from cl.engine.collectives import Workers
from cl.engine.normalise import unit
from cl.engine.outcome import Outcome
from cl.objectives import Objective
from cl.pairs import Clock, Extra, Pairs
from cl.training.config import Precision
from cl.training.length import RunLength
from cl.training.precision import autocast


class StepOutput(NamedTuple):
    """What the forward pass of a step gives.

    Attributes:
        loss: 0-d, the global loss; its gradients follow the engine's convention.
        metrics: name -> detached 0-d tensor.
        finite: bool [B], whether all of a sample's embeddings are finite; masked samples count as finite.
        embeddings: view -> [B, D], detached, of the towers in training.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    finite: Tensor
    embeddings: dict[str, Tensor]


class TrainStep(nn.Module):
    """Towers, teachers and objective.

    Args:
        model: gives normalised embeddings [B, D] by view.
        objective: built by `build_objective`.
        workers: those that share negatives.
        precision: that of the towers; the objective computes in float32 or float64.
        teachers: name -> teacher; their embeddings are further views.
        length: of the run, which the objective's clock needs.
    """

    def __init__(
        self,
        model: EncoderModel,
        objective: Objective,
        workers: Workers,
        precision: Precision,
        teachers: Mapping[str, Teacher] = MappingProxyType({}),
        length: RunLength | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.workers, self.precision, self.length = workers, precision, length
        self._teachers = nn.ModuleDict(teachers)

    @property
    def teachers(self) -> dict[str, Teacher]:
        """The teachers by name."""
        return {name: teacher for name, teacher in self._teachers.items() if isinstance(teacher, Teacher)}

    def forward(self, batch: Batch, skip: Collection[str] | None = None) -> StepOutput | dict[str, Tensor]:
        """The step's outcome; or, for gradient caching, the embeddings of the views that are not in `skip` alone."""
        clock = self._clock(batch)
        self.model.follow_(clock)
        others = {*(skip or ()), *self._taught_views()}
        wanted = {view for view in self._own_views(batch) if not others.issuperset(self._outputs(view))}
        with autocast(self.precision, batch.weight.device):
            views = self.model({name: view for name, view in batch.views.items() if name in wanted})
            for name, further in batch.extra.items():
                if name not in others:
                    views[name] = self.model.encode(further.view, further.inputs)
            for teacher in self.teachers.values():
                views |= teacher(batch.views, skip or ())
        return self.judge(views, batch) if skip is None else views

    def _clock(self, batch: Batch) -> Clock:
        return self.length.clock(batch.epoch, batch.step) if self.length else Clock()

    def _taught_views(self) -> list[str]:
        """The names of what the teachers give."""
        return [view for teacher in self.teachers.values() for view in teacher.outputs]

    def _own_views(self, batch: Batch) -> list[str]:
        """The views that the towers in training read; a teacher may have an input of its own."""
        taught = {teacher_view(view, name) for name, teacher in self.teachers.items() for view in teacher.views}
        return [view for view in batch.views if view not in taught]

    def _outputs(self, view: str) -> list[str]:
        """The names of what a view gives."""
        return list(self.model.outputs.get(view, {"embedding": view}).values())

    def view_groups(self, batch: Batch) -> list[list[str]]:
        """What gradient caching encodes together: each view alone, for the memory of the largest tower, and those of
        the teachers.
        """
        taught = self._taught_views()
        own = [self._outputs(view) for view in self._own_views(batch)]
        return [*own, *([name] for name in batch.extra), *([taught] if taught else [])]

    def judge(self, views: Mapping[str, Tensor], batch: Batch) -> StepOutput:
        """The objective on the embeddings of a whole local batch."""
        extra = {
            name: Extra(views[name], further.owner, further.role, content=_content_of(further))
            for name, further in batch.extra.items()
        }
        views = {name: view for name, view in views.items() if name not in extra}
        kind = next(iter(views.values())).dtype
        views |= {name: unit(embeddings.to(kind)) for name, embeddings in batch.stored.items()}
        finite = torch.stack([view.detach().isfinite().flatten(1).all(dim=1) for view in views.values()]).all(dim=0)
        words = self.model.words({view: batch.views[view] for view in self._own_views(batch)})
        pairs = Pairs(
            views=views,
            ids=batch.ids,
            content=batch.content,
            weight=batch.weight,
            labels=batch.labels,
            tokens={name: real for name, (_, real) in words.items()},
            token_ids={name: ids for name, (ids, _) in words.items()},
            extra=extra,
            clock=self._clock(batch),
        )
        for each in extra.values():
            finite[each.owner[~each.embeddings.detach().isfinite().all(dim=1)]] = False
        outcome = self.objective(pairs, self.workers)
        names = [self.model.outputs.get(view, {"embedding": view}).get("embedding") for view in self._own_views(batch)]
        embeddings = {name: views[name].detach() for name in names if name is not None}
        return StepOutput(outcome.loss, outcome.metrics, finite | (batch.weight == 0), embeddings)

    def frozen_views(self, batch: Batch) -> list[str]:
        """Views whose tower has nothing to train, and those of teachers: gradient caching encodes them once."""
        towers = self.model.towers
        still = [
            output
            for view, name in self.model.views.items()
            if not any(p.requires_grad for p in towers[name].parameters())
            for output in self._outputs(view)
            if not output.endswith("_tokens")  # their head is trained
        ]
        still += [name for name, further in batch.extra.items() if self._outputs(further.view)[0] in still]
        return still + self._taught_views()


def _content_of(further: Further) -> Tensor | None:
    """A further positive has the content of its owner, which the engine knows."""
    return further.content if further.role == "negative" else None


def forward_backward(module: nn.Module, step: TrainStep, batch: Batch, micro_batch: int | None) -> StepOutput:
    """One step's loss and its gradients in `.grad`.

    Args:
        module: `step` as `wrap` returned it.
        step: towers and objective.
        batch: this worker's part of the global batch.
        micro_batch: samples encoded at a time (`cl.engine.cache`); the result is the same. None: all at once.
    """
    if micro_batch is None:
        output: StepOutput = module(batch)
        output.loss.backward()
        return output._replace(loss=output.loss.detach())
    judged: list[StepOutput] = []

    def objective(views: Mapping[str, Tensor]) -> Outcome:
        judged.append(step.judge(views, batch))
        return Outcome(judged[0].loss, judged[0].metrics)

    chunks = [batch.rows(slice(i, i + micro_batch)) for i in range(0, max(len(batch), 1), micro_batch)]
    cached = CachedBatch(
        module,
        chunks,
        device=batch.weight.device,
        groups=step.view_groups(batch),
        frozen=step.frozen_views(batch),
        wrapper=module,
    )
    outcome = cached.evaluate(objective, list(step.objective.parameters()))
    cached.backward()
    return judged[0]._replace(loss=outcome.loss)
