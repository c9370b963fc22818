"""Evaluates any rule over all rows x all columns of all workers, tile by tile, with exact gradients.

Forward (`evaluation.py`): for each pass, a sweep reduces every tile to statistics and throws the tile away. Then
`finish` turns the statistics of local samples into the loss. Backward (`adjoint.py`) computes each tile again. With P
passes whose statistics carry gradients that is 2P + 2 matrix products a tile, and memory is O(batch x dim) whatever the
rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cl.engine.adjoint import Adjoint
from cl.engine.collectives import Workers
from cl.engine.evaluation import Evaluation, input_statistics
from cl.engine.rule import Rule
from cl.engine.side import Side, columns_of
from cl.engine.statistics import Key
from cl.engine.sweep import Exchange, Tiling
from cl.errors import DataError
from cl.pairs import Clock


def evaluate(
    rule: Rule,
    sides: Sequence[Side],
    workers: Workers,
    exchange: Exchange = "gather",
    tiling: Tiling | None = None,
    *,
    weight: Tensor | None = None,
    meta: Mapping[str, Tensor] | None = None,
    targets: Mapping[str, Tensor] | None = None,
    clock: Clock | None = None,
    candidates: Workers | None = None,
) -> tuple[Tensor, dict[Key, Tensor]]:
    """The loss of the global batch under a rule, with gradients by the convention of `cl.engine.collectives`.

    Args:
        rule: says what to reduce and how statistics become a loss.
        sides: the views, each with this worker's rows; row i of the first is sample i.
        workers: who takes part.
        exchange: how columns of other workers are seen.
        tiling: the size of a tile.
        weight: [B] of the samples; that of the first side if None.
        meta: name -> [B, ...], what `finish` may read of the samples beside `sample` and `weight`.
        targets: name -> [B, N], what `tile` may read of local rows x all columns.
        clock: where in the run this step is.
        candidates: the sub-group that shares candidates, if not all workers do; the mean stays that of all.

    Returns:
        The loss, and the local value [B] of every statistic, detached.

    Raises:
        DataError: a replicated side among the rows.
    """
    seen = Workers() if exchange == "local" else candidates or workers
    first = sides[0]
    weight = first.weight if weight is None else weight
    known = {"sample": first.sample, "key": first.sample, **(meta or {}), "weight": weight}
    run = Evaluation(
        rule,
        columns_of(sides, seen),
        first.sample,
        weight,
        known,
        targets or {},
        exchange,
        (tiling or Tiling()).on(weight.device),
        workers,
        clock or Clock(),
    )
    for comparison in run.comparisons():
        if run.columns[comparison.rows].side.replicated:
            raise DataError(f"{comparison.rows!r} is the same on every worker: compare it as columns, not as rows.")
    store: dict[Key, Tensor] = {}
    parameters = [tensor for tensor in rule.learnt() if tensor.requires_grad]
    loss = _Evaluate.apply(run, store, len(sides), *(side.embeddings for side in sides), *parameters)
    return loss, store


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Evaluation, store: dict[Key, Tensor], count: int, *tensors: Tensor) -> Tensor:
        embeddings: dict[str, Tensor] = {}
        for (view, columns), value in zip(run.columns.items(), tensors[:count], strict=True):
            # A masked sample may hold anything, NaN too: it must not reach a product.
            alive = (columns.side.weight > 0).view(-1, *[1] * (value.dim() - 1))
            embeddings[view] = value.detach().where(alive, 0)
        with torch.autocast(tensors[0].device.type, enabled=False), torch.no_grad():
            inputs = run.rule.inputs(run.samples({}, embeddings, {}, {}))
            finished = input_statistics(inputs, run.columns)
            produced: list[list[Key]] = []
            tilers = list(run.rule.passes())
            for number, tiler in enumerate(tilers, 1):
                done = run.forward_pass(tiler, embeddings, finished, last=number == len(tilers))
                produced.append(list(done))
                finished = finished | done
            local = run.local(finished)
            prepared = run.rule.prepare(run.samples(local, embeddings, {}, finished))
            means, inverse = run.means(run.samples(local, embeddings, prepared, finished))
            loss = run.rule.combine(means)
        store.update(local)
        ctx.run, ctx.embeddings, ctx.parameters = run, embeddings, tensors[count:]
        ctx.finished, ctx.produced, ctx.inputs, ctx.prepared = finished, produced, list(inputs), prepared
        ctx.means = means, inverse
        ctx.dtypes = [value.dtype for value in tensors[:count]]
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        device = next(iter(ctx.embeddings.values())).device.type
        with torch.autocast(device, enabled=False):
            adjoint = Adjoint(
                ctx.run, ctx.embeddings, ctx.parameters, ctx.finished, ctx.produced, ctx.inputs, ctx.prepared, ctx.means
            ).run()
        scale = grad * ctx.run.workers.averaged_by
        d_embeddings = [
            (adjoint.embeddings[view] * scale).to(dtype) if view in adjoint.embeddings else None
            for view, dtype in zip(ctx.embeddings, ctx.dtypes, strict=True)
        ]
        return None, None, None, *d_embeddings, *(value * scale for value in adjoint.parameters)
