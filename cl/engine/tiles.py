"""Evaluates any rule over all rows x all columns of all workers, tile by tile, with exact gradients.

Forward: for each pass, a sweep reduces every tile to statistics and throws the tile away. Then `finish` turns the
statistics of local samples into the loss. Backward: `finish` gives the adjoint of every statistic; sweeps in reverse
order carry adjoints of later passes to the statistics that they read; one last sweep computes each tile again and takes
its gradient to the scores, from there to rows and columns by two matrix products. With P passes whose statistics carry
gradients that is 2P + 2 products a tile, and memory is O(batch x dim) whatever the rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from cl.engine.collectives import Layout, Workers
from cl.engine.rule import Known, Reduction, Rule, Samples, Side, Term, Tile, Tiler
from cl.engine.statistics import Finished, Key, Part, Running, weights_of
from cl.engine.sweep import (
    ColumnExchange,
    Exchange,
    Tiling,
    accumulation_type,
    add_product_,
    product,
    repeated_content,
)


@dataclass(frozen=True)
class Columns:
    """A side as all workers see it: its layout and what is known of every column (not the embeddings)."""

    side: Side
    layout: Layout
    known: Known

    @staticmethod
    def of(side: Side, workers: Workers) -> Columns:
        layout = (
            Layout(Workers(), (len(side.sample),))
            if side.replicated
            else workers.layout(len(side.sample), side.sample.device)
        )
        content = None if side.content is None else layout.gather(side.content)
        repeated = None if content is None else repeated_content(content).any(1)
        if repeated is not None and not repeated.any():  # all different, as in most batches: nothing to compare
            content = repeated = None
        weight = layout.gather(side.weight)
        known = Known(
            sample=layout.gather(side.sample),
            weight=weight,
            content=content,
            repeated=repeated,
            meta={name: layout.gather(value) for name, value in side.meta.items()},
            statistics={},
            masked=bool((weight == 0).any()),
        )
        return Columns(side, layout, known)


def _slice(known: Known, at: slice, statistics: Mapping[str, Tensor]) -> Known:
    return Known(
        known.sample[at],
        known.weight[at],
        None if known.content is None else known.content[at],
        None if known.repeated is None else known.repeated[at],
        {name: value[at] for name, value in known.meta.items()},
        statistics,
        known.masked,
    )


def _each(reductions: Mapping[str, Reduction | Sequence[Reduction]]) -> Iterator[tuple[str, Reduction]]:
    for name, value in reductions.items():
        for reduction in [value] if isinstance(value, Reduction) else value:
            yield name, reduction


@dataclass
class Evaluation:
    """One step of one rule: what does not change between forward and backward."""

    rule: Rule
    columns: dict[str, Columns]  # by view
    exchange: Exchange
    tiling: Tiling
    workers: Workers  # over whom the loss is a mean

    def groups(self) -> list[tuple[str, list[str]]]:
        """Comparisons by column view, so that columns are brought here once: (column view, row views)."""
        found: dict[str, list[str]] = {}
        for rows, columns in self.rule.comparisons(list(self.columns)):
            found.setdefault(columns, []).append(rows)
        return list(found.items())

    def tiles(
        self, exchange: ColumnExchange, embeddings: Mapping[str, Tensor], row_views: Sequence[str]
    ) -> Iterator[Any]:
        """(row view, rows, columns of the block, columns of all, block) of every tile of a sweep."""
        for block in exchange:
            for view in row_views:
                for i, j in self.tiling.cut(len(embeddings[view]), len(block.values)):
                    yield view, i, j, slice(block.start + j.start, block.start + j.stop), block

    def tile(
        self,
        scores: Tensor,
        view: str,
        i: slice,
        column_view: str,
        at: slice,
        rows: dict[str, Tensor],
        columns: dict[str, Tensor],
    ) -> Tile:
        start = self.columns[view].layout.local.start
        return Tile(
            scores,
            view,
            column_view,
            _slice(self.columns[view].known, slice(start + i.start, start + i.stop), rows),
            _slice(self.columns[column_view].known, at, columns),
        )

    def forward_pass(
        self, tiler: Tiler, embeddings: Mapping[str, Tensor], earlier: Mapping[Key, Finished]
    ) -> dict[Key, Finished]:
        """Sweep once and finish the statistics of one pass."""
        running = Running()
        layouts = {view: columns.layout for view, columns in self.columns.items()}
        for column_view, row_views in self.groups():
            exchange = ColumnExchange(embeddings[column_view], layouts[column_view], self.exchange)
            for view, i, j, at, block in self.tiles(exchange, embeddings, row_views):
                scores = product(embeddings[view][i], block.values[j].T)
                rows = self.readable(view, earlier, "local", i)
                columns = self.readable(column_view, earlier, "everyone", at)
                tile = self.tile(scores, view, i, column_view, at, rows, columns)
                for name, reduction in _each(tiler(tile)):
                    by_row = reduction.axis == "row"
                    key = (name, view if by_row else column_view)
                    size = len(embeddings[view]) if by_row else layouts[column_view].total
                    part = running.part(key, reduction, size)
                    part.add_(i if by_row else at, reduction, tile.counts(reduction), at.start)
        return running.finish(layouts)

    def readable(
        self, view: str, finished: Mapping[Key, Finished], which: Literal["local", "everyone"], at: slice
    ) -> dict[str, Tensor]:
        """The values of one view's statistics that a tile reads.

        A masked sample's log-sum-exp is -inf and would turn the slopes of entries that do not count into 0 x inf; it
        reads as 0.
        """
        columns = self.columns[view]
        weight = columns.known.weight[columns.layout.local] if which == "local" else columns.known.weight
        values = {}
        for (name, owner), done in finished.items():
            if owner == view:
                part: Part = getattr(done, which)
                value = part.value[at].detach()
                keep = (weight[at] > 0).view(-1, *[1] * (value.dim() - 1)) | value.isfinite()
                values[name] = value.where(keep, 0)
        return values

    def samples(
        self, statistics: Mapping[Key, Tensor], embeddings: Mapping[str, Tensor], prepared: Mapping[str, Tensor]
    ) -> Samples:
        first = next(iter(self.columns.values())).side
        return Samples(statistics, embeddings, {**first.meta, "sample": first.sample, "weight": first.weight}, prepared)

    def means(self, s: Samples) -> tuple[Tensor, Tensor]:
        """This worker's part of each term's global mean [T] (with gradient), and the global means [T]."""
        result = self.rule.finish(s)
        terms = [Term(result)] if isinstance(result, Tensor) else list(result)
        parts, totals = [], []
        for term in terms:
            weight = s.meta["weight"].to(term.values.dtype)
            weight = weight if term.valid is None else weight * term.valid
            # Not weight * values: what a masked sample holds may be infinite.
            parts.append(term.factor * (weight * term.values.where(weight > 0, 0)).sum())
            totals.append(weight.sum())
        sums, total = torch.stack(parts), self.workers.all_reduce(torch.stack(totals).detach())
        local = torch.where(total > 0, sums / total.where(total > 0, 1), 0)
        return local, self.workers.all_reduce(local.detach().clone())


def evaluate(
    rule: Rule,
    sides: Sequence[Side],
    workers: Workers,
    exchange: Exchange = "gather",
    tiling: Tiling | None = None,
) -> tuple[Tensor, dict[Key, Tensor]]:
    """The loss of the global batch under a rule, with gradients by the convention of `cl.engine.collectives`.

    Args:
        rule: says what to reduce and how statistics become a loss.
        sides: the views, each with this worker's rows; the first says which samples there are and their weight.
        workers: who takes part.
        exchange: how columns of other workers are seen.
        tiling: the size of a tile.

    Returns:
        The loss, and the local value [B] of every statistic, detached.
    """
    seen = Workers() if exchange == "local" else workers
    columns = {side.name: Columns.of(side, seen) for side in sides}
    run = Evaluation(rule, columns, exchange, tiling or Tiling(), workers)
    store: dict[Key, Tensor] = {}
    parameters = [tensor for tensor in rule.learnt() if tensor.requires_grad]
    loss = _Evaluate.apply(run, store, len(sides), *(side.embeddings for side in sides), *parameters)
    return loss, store


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Evaluation, store: dict[Key, Tensor], count: int, *tensors: Tensor) -> Tensor:
        embeddings: dict[str, Tensor] = {}
        for columns, value in zip(run.columns.values(), tensors[:count], strict=True):
            # A masked sample may hold anything, NaN too: it must not reach a product.
            embeddings[columns.side.name] = value.detach().where((columns.side.weight > 0)[:, None], 0)
        with torch.autocast(tensors[0].device.type, enabled=False), torch.no_grad():
            inputs = run.rule.inputs(run.samples({}, embeddings, {}))
            finished = {key: _input(value, run.columns[key[1]].layout) for key, value in inputs.items()}
            produced: list[list[Key]] = []
            for tiler in run.rule.passes():
                done = run.forward_pass(tiler, embeddings, finished)
                produced.append(list(done))
                finished = finished | done
            local = {key: done.local.value for key, done in finished.items()}
            prepared = run.rule.prepare(run.samples(local, embeddings, {}))
            _, means = run.means(run.samples(local, embeddings, prepared))
            loss = run.rule.combine(means)
        store.update(local)
        ctx.run, ctx.finished, ctx.produced, ctx.prepared, ctx.inputs = run, finished, produced, prepared, list(inputs)
        ctx.embeddings = embeddings
        ctx.parameters = tensors[count:]
        ctx.dtypes = [value.dtype for value in tensors[:count]]
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        device = next(iter(ctx.embeddings.values())).device.type
        with torch.autocast(device, enabled=False):
            gradients = _Backward(ctx).run()
        scale = grad * ctx.run.workers.averaged_by
        views = list(ctx.embeddings)
        d_embeddings = [
            (gradients.embeddings[view] * scale).to(dtype) for view, dtype in zip(views, ctx.dtypes, strict=True)
        ]
        d_parameters = [value * scale for value in gradients.parameters]
        return None, None, None, *d_embeddings, *d_parameters


def _input(value: Tensor, layout: Layout) -> Finished:
    value = value.detach()
    return Finished(Part("sum", value), Part("sum", layout.gather(value)))


class _Backward:
    """The reverse sweeps of one evaluation; gradients are of the global loss, before any scaling."""

    def __init__(self, ctx: Any) -> None:
        self.run_: Evaluation = ctx.run
        self.finished: dict[Key, Finished] = ctx.finished
        self.produced: list[list[Key]] = ctx.produced
        self.inputs: list[Key] = ctx.inputs
        self.prepared: Mapping[str, Tensor] = ctx.prepared
        self.values: dict[str, Tensor] = ctx.embeddings
        self.parameters_: tuple[Tensor, ...] = ctx.parameters
        self.embeddings = {
            view: torch.zeros(value.shape, dtype=accumulation_type(value.dtype), device=value.device)
            for view, value in self.values.items()
        }
        self.parameters = [torch.zeros_like(parameter) for parameter in self.parameters_]
        self.adjoint = {key: torch.zeros_like(done.local.value) for key, done in self.finished.items()}
        self.everyone: dict[Key, Tensor] = {}  # adjoints of all workers' rows, of passes whose adjoints are complete

    def run(self) -> _Backward:
        self._finish()
        tilers = list(self.run_.rule.passes())
        last = len(tilers) - 1
        for number in range(last, 0, -1):
            self._complete(self.produced[number])
            self._sweep({number: tilers[number]}, to_scores=False)
        if tilers:
            self._complete(self.produced[0])
            self._sweep(dict(enumerate(tilers)), to_scores=True)
        self._inputs()
        return self

    def _finish(self) -> None:
        """Adjoints of the statistics, and the gradients that need no tile."""
        run = self.run_
        with torch.enable_grad():
            leaves = {key: done.local.value.detach().requires_grad_() for key, done in self.finished.items()}
            views = {view: value.detach().requires_grad_() for view, value in self.values.items()}
            local, means = run.means(run.samples(leaves, views, self.prepared))
            means.requires_grad_()
            (slope,) = torch.autograd.grad(run.rule.combine(means), means)
            targets = [*leaves.values(), *views.values(), *self.parameters_]
            grads = torch.autograd.grad((local * slope).sum(), targets, allow_unused=True, materialize_grads=True)
        for key, grad in zip(leaves, grads, strict=False):
            # A statistic of nothing is -inf; it has no slope.
            value = self.finished[key].local.value
            self.adjoint[key] += grad.where(value.isfinite(), 0)
        for view, grad in zip(views, grads[len(leaves) :], strict=False):
            self.embeddings[view] += grad
        for total, grad in zip(self.parameters, grads[len(leaves) + len(views) :], strict=True):
            total += grad

    def _complete(self, keys: Sequence[Key]) -> None:
        """All later passes have added their share: let every worker know the adjoints of all rows."""
        for key in keys:
            self.everyone[key] = self.run_.columns[key[1]].layout.gather(self.adjoint[key])

    def _sweep(self, tilers: Mapping[int, Tiler], to_scores: bool) -> None:
        """One reverse sweep: to the scores (and parameters) at the end, else to the statistics that tiles read."""
        run = self.run_
        produced = {key for number in tilers for key in self.produced[number]}
        readable = [key for key in self.finished if key[0] not in run.rule.stopped]
        if to_scores:  # of later passes only the inputs are still to be reached; their statistics have been
            readable = [key for key in readable if key in self.inputs]
        else:
            readable = [key for key in readable if key not in produced and key not in self.inputs]
            if not readable:  # what the pass reads is constant
                return
        column_adjoint = {key: torch.zeros_like(self.finished[key].everyone.value) for key in readable}
        for column_view, row_views in run.groups():
            values = self.values[column_view]
            layout = run.columns[column_view].layout
            kind = self.embeddings[column_view].dtype
            exchange = ColumnExchange(values, layout, run.exchange, accumulate=kind if to_scores else None)
            for view, i, j, at, block in run.tiles(exchange, self.values, row_views):
                scores = product(self.values[view][i], block.values[j].T)
                with torch.enable_grad():
                    scores.requires_grad_(to_scores)
                    rows = self._leaves(view, "local", i, readable)
                    columns = self._leaves(column_view, "everyone", at, readable)
                    tile = run.tile(scores, view, i, column_view, at, rows, columns)
                    total = scores.new_zeros(())
                    for tiler in tilers.values():
                        for name, reduction in _each(tiler(tile)):
                            by_row = reduction.axis == "row"
                            key = (name, view if by_row else column_view)
                            total = total + self._surrogate(key, reduction, tile, i if by_row else at, at.start)
                if not total.requires_grad:
                    continue
                row_leaves = {(name, view): leaf for name, leaf in rows.items() if leaf.requires_grad}
                column_leaves = {(name, column_view): leaf for name, leaf in columns.items() if leaf.requires_grad}
                targets = [*row_leaves.values(), *column_leaves.values()]
                if to_scores:
                    targets += [scores, *self.parameters_]
                grads = torch.autograd.grad(total, targets, allow_unused=True, materialize_grads=True)
                for key, grad in zip(row_leaves, grads, strict=False):
                    self.adjoint[key][i] += grad
                for key, grad in zip(column_leaves, grads[len(row_leaves) :], strict=False):
                    column_adjoint[key][at] += grad
                if to_scores:
                    slope, *d_parameters = grads[len(row_leaves) + len(column_leaves) :]
                    slope = slope.to(values.dtype)
                    add_product_(self.embeddings[view][i], slope, block.values[j])
                    add_product_(block.gradient[j], slope.T, self.values[view][i])
                    for sum_, grad in zip(self.parameters, d_parameters, strict=True):
                        sum_ += grad
            if to_scores:
                self.embeddings[column_view] += exchange.gradient()
        for key in readable:
            self.adjoint[key] += run.columns[key[1]].layout.reduce_scatter(column_adjoint[key])

    def _leaves(
        self, view: str, which: Literal["local", "everyone"], at: slice, readable: Sequence[Key]
    ) -> dict[str, Tensor]:
        values = self.run_.readable(view, self.finished, which, at)
        return {name: value.requires_grad_((name, view) in readable) for name, value in values.items()}

    def _surrogate(self, key: Key, reduction: Reduction, tile: Tile, at: slice, first_column: int) -> Tensor:
        """A number whose gradient to the tile is the adjoint-weighted gradient of the statistic's entries."""
        by_row = reduction.axis == "row"
        done = self.finished[key]
        part = done.local if by_row else done.everyone
        adjoint = (self.adjoint if by_row else self.everyone)[key][at]
        counts = tile.counts(reduction)

        def broadcast(value: Tensor) -> Tensor:
            return value[at][:, None] if by_row else value[at][None]

        weight = adjoint[:, None] if by_row else adjoint[None]
        values = reduction.values if counts is None else reduction.values.where(counts, 0)
        if reduction.kind == "sum":
            return (weight * values).sum()
        if reduction.kind == "top":
            assert part.position is not None
            position = part.position[at] - first_column
            here = (position >= 0) & (position < values.shape[1])
            picked = values.gather(1, position.where(here, 0)) if values.shape[1] else values.new_zeros(position.shape)
            return (adjoint * picked).where(here, 0).sum()
        lse = part.value if reduction.kind == "lse" else part.lse
        assert lse is not None
        chance = weights_of(values.detach(), broadcast(lse))
        chance = chance if counts is None else chance.where(counts, 0)
        if reduction.kind == "lse":
            return (weight * chance * values).sum()
        assert reduction.payload is not None
        payload = reduction.payload if counts is None else reduction.payload.where(counts, 0)
        tilt = weight * chance * (payload.detach() - broadcast(part.value))
        return (weight * chance * payload).sum() + (tilt * values).sum()

    def _inputs(self) -> None:
        """From the adjoints of the per-sample inputs to what they were computed from."""
        if not self.inputs:
            return
        run = self.run_
        with torch.enable_grad():
            views = {view: value.detach().requires_grad_() for view, value in self.values.items()}
            values = run.rule.inputs(run.samples({}, views, {}))
            total = sum((values[key] * self.adjoint[key]).sum() for key in self.inputs)
        if not isinstance(total, Tensor) or not total.requires_grad:
            return
        targets = [*views.values(), *self.parameters_]
        grads = torch.autograd.grad(total, targets, allow_unused=True, materialize_grads=True)
        for view, grad in zip(views, grads, strict=False):
            self.embeddings[view] += grad
        for sum_, grad in zip(self.parameters, grads[len(views) :], strict=True):
            sum_ += grad


def sides_of(views: Mapping[str, Tensor], layout: Layout, weight: Tensor, **known: Any) -> list[Side]:
    """The views of one batch as sides; row i of each belongs to sample i of this worker."""
    start = layout.local.start
    rows = len(weight)
    sample = torch.arange(start, start + rows, device=weight.device)
    base = Side("", next(iter(views.values())), sample, weight, **known)
    return [replace(base, name=name, embeddings=value) for name, value in views.items()]
