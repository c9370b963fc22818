"""The backward half of evaluating a rule: reverse sweeps that compute tiles again and carry adjoints back.

`finish` gives the adjoint of every statistic of local samples. From the last pass to the second, a sweep carries the
adjoints of its statistics to the statistics that its tiles read; one last sweep takes the gradient of all passes to the
scores, from there to rows and columns by two matrix products. Gradients are of the global loss, before any scaling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl.engine.evaluation import MAIN, Cut, Evaluation, by_layout, each, rows_of
from cl.engine.products import accumulation_type, add_product_
from cl.engine.reduction import Reduction
from cl.engine.rule import Tiler
from cl.engine.statistics import Finished, Key, weights_of
from cl.engine.tile import Tile

Leaves = tuple[dict[str, Tensor], dict[str, Tensor]]  # the statistics that a tile reads of its rows and columns


class Adjoint:
    """The gradients of one evaluation.

    Args:
        run: the evaluation.
        embeddings: view -> this worker's rows.
        parameters: what else receives a gradient.
        finished: every statistic of the forward half; those named in `inputs` came from `Rule.inputs`.
        produced: the statistics of each pass.
        prepared: what `Rule.prepare` returned.
        means: the global mean of each term, and 1 / the weight behind it.

    Attributes:
        embeddings, parameters: the gradients, once `run()` has been called.
    """

    def __init__(
        self,
        run: Evaluation,
        embeddings: Mapping[str, Tensor],
        parameters: Sequence[Tensor],
        finished: Mapping[Key, Finished],
        produced: Sequence[Sequence[Key]],
        inputs: Sequence[Key],
        prepared: Mapping[str, Tensor],
        means: tuple[Tensor, Tensor],
    ) -> None:
        self.evaluation, self.values, self.learnt = run, embeddings, parameters
        self.finished, self.produced, self.inputs, self.prepared = finished, produced, inputs, prepared
        self.means = means
        self.embeddings = {
            view: torch.zeros(value.shape, dtype=accumulation_type(value.dtype), device=value.device)
            for view, value in embeddings.items()
            if run.columns[view].trained
        }
        self.parameters = [torch.zeros_like(parameter) for parameter in parameters]
        self.adjoint = {key: torch.zeros_like(done.local.value) for key, done in finished.items()}
        self.everyone: dict[Key, Tensor] = {}  # adjoints of all workers' rows, of passes whose adjoints are complete
        self.offsets = run.offsets()
        self.mine, self.others = run.readable(finished, "local"), run.readable(finished, "everyone")

    def run(self) -> Adjoint:
        self._finish()
        tilers = list(self.evaluation.rule.passes())
        for number in range(len(tilers) - 1, 0, -1):
            self._complete(self.produced[number])
            self._to_statistics(number, tilers[number])
        if tilers:
            self._complete(self.produced[0])
            self._to_scores(tilers)
        self._inputs()
        for exchange in self.evaluation.brought.values():
            exchange.release()
        return self

    def _finish(self) -> None:
        """Adjoints of the statistics, and the gradients that need no tile."""
        run = self.evaluation
        with torch.enable_grad():
            leaves = {key: value.requires_grad_() for key, value in run.local(self.finished).items()}
            views = self._views()
            sums, _ = run.sums(run.samples(leaves, views, self.prepared, self.finished))
            means, inverse = self.means
            means = means.detach().requires_grad_()
            (slope,) = torch.autograd.grad(run.rule.combine(means), means)
            grads = self._grad((sums * inverse * slope).sum(), [*leaves.values(), *views.values(), *self.learnt])
        for key, grad in zip(leaves, grads, strict=False):
            # A statistic of nothing is -inf; it has no slope.
            value = self.finished[key].local.value
            self.adjoint[key] += grad.where(value.isfinite(), 0)
        self._take(views, grads[len(leaves) :])

    def _views(self) -> dict[str, Tensor]:
        """The embeddings as leaves."""
        trained = self.evaluation.columns
        return {view: value.detach().requires_grad_(trained[view].trained) for view, value in self.values.items()}

    def _grad(self, total: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        """The gradient of `total` to each target; zeros where there is none."""
        wanted = [target for target in targets if target.requires_grad]
        if not total.requires_grad or not wanted:
            return [torch.zeros_like(target) for target in targets]
        found = iter(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
        return [next(found) if target.requires_grad else torch.zeros_like(target) for target in targets]

    def _take(self, views: Mapping[str, Tensor], grads: Sequence[Tensor]) -> None:
        """Add gradients of whole views, then of parameters."""
        for view, grad in zip(views, grads, strict=False):
            if view in self.embeddings:
                self.embeddings[view] += grad
        for total, grad in zip(self.parameters, grads[len(views) :], strict=True):
            total += grad

    def _complete(self, keys: Sequence[Key]) -> None:
        """All later passes have added their share: let every worker know the adjoints of all rows that columns of its
        tiles were reduced to.
        """
        reduced = [key for key in keys if self.finished[key].by_column]
        for layout, several in by_layout(reduced, self.evaluation.columns):
            complete = layout.complete([self.adjoint[key] for key in several])
            self.everyone |= dict(zip(several, complete, strict=True))

    def _to_statistics(self, number: int, tiler: Tiler) -> None:
        """From the adjoints of one pass to those of the statistics that it reads."""
        run = self.evaluation
        earlier = [key for keys in self.produced[:number] for key in keys]
        readable = [key for key in earlier if key[0] not in run.rule.stopped]
        if not readable:  # what the pass reads is constant
            return
        sums = self._nothing(readable)
        for views, comparisons in run.groups():
            for cut in run.cuts(views, self.values, comparisons):
                with torch.enable_grad():
                    leaves = self._leaves(cut, readable)
                    total = self._surrogates(cut, run.scores(cut, self.values), leaves, [tiler])
                self._take_statistics(cut, leaves, self._grad(total, _flat(leaves)), sums)
        self._home(sums)

    def _to_scores(self, tilers: Sequence[Tiler]) -> None:
        """From the adjoints of all passes to embeddings and parameters; of what tiles read, inputs alone are left."""
        run = self.evaluation
        sums = self._nothing(self.inputs)
        for views, comparisons in run.groups():
            for cut in run.cuts(views, self.values, comparisons, accumulate=True):
                with torch.enable_grad():
                    leaves = self._leaves(cut, self.inputs)
                    scores = _Scores(self, cut)
                    total = self._surrogates(cut, scores.values, leaves, tilers)
                statistics = _flat(leaves)
                grads = self._grad(total, [*statistics, *scores.leaves, *self.learnt])
                self._take_statistics(cut, leaves, grads, sums)
                scores.take(grads[len(statistics) :])
                self._take({}, grads[len(statistics) + len(scores.leaves) :])
            for view in views:
                if view in self.embeddings:
                    self.embeddings[view] += run.brought[view].gradient()
        self._home(sums)

    def _leaves(self, cut: Cut, readable: Sequence[Key]) -> Leaves:
        """What the tile reads of its rows and of its columns; a gradient is wanted where `readable`."""
        comparison = cut.comparison
        rows = rows_of(self.mine[comparison.rows], cut.i)
        columns = rows_of(self.others[comparison.columns], cut.at)
        for view, values in ((comparison.rows, rows), (comparison.columns, columns)):
            for name, value in values.items():
                value.requires_grad_((name, view) in readable)
        return rows, columns

    def _take_statistics(
        self,
        cut: Cut,
        leaves: Leaves,
        grads: Sequence[Tensor],
        sums: dict[Key, Tensor],
    ) -> None:
        """Add the gradients of what a tile read (in `_flat` order): rows are this worker's, columns anybody's."""
        found = iter(grads)
        for view, values, at, into in (
            (cut.comparison.rows, leaves[0], cut.i, self.adjoint),
            (cut.comparison.columns, leaves[1], cut.at, sums),
        ):
            for name, leaf in values.items():
                if leaf.requires_grad:
                    into[name, view][at] += next(found)

    def _nothing(self, keys: Sequence[Key]) -> dict[Key, Tensor]:
        """Zeros for the adjoints of all workers' rows."""
        everyone = {key: self.finished[key].everyone for key in keys}
        return {key: torch.zeros_like(part.value) for key, part in everyone.items() if part is not None}

    def _home(self, sums: Mapping[Key, Tensor]) -> None:
        """Bring the column adjoints to the workers that own them."""
        for layout, keys in by_layout(sums, self.evaluation.columns):
            for key, value in zip(keys, layout.reduce_scatter_together([sums[key] for key in keys]), strict=True):
                self.adjoint[key] += value

    def _surrogates(
        self,
        cut: Cut,
        scores: Mapping[str, Tensor],
        leaves: Leaves,
        tilers: Sequence[Tiler],
    ) -> Tensor:
        """A number whose gradient to the tile is that of the loss."""
        run = self.evaluation
        tile = run.tile(cut, scores, *leaves)
        total = tile.scores.new_zeros(())
        for tiler in tilers:
            for name, reduction in each(tiler(tile)):
                total = total + self._surrogate(name, reduction, tile, cut)
        return total

    def _surrogate(self, name: str, reduction: Reduction, tile: Tile, cut: Cut) -> Tensor:
        """A number whose gradient to the tile is the adjoint-weighted gradient of one statistic's entries."""
        by_row = reduction.axis == "row"
        key = (name, cut.comparison.rows if by_row else cut.comparison.columns)
        at = cut.i if by_row else cut.at
        done = self.finished[key]
        part = done.local if by_row else done.everyone
        assert part is not None
        adjoint = (self.adjoint if by_row else self.everyone)[key][at]
        counts = tile.counts(reduction)

        def broadcast(value: Tensor) -> Tensor:
            return value[:, None] if by_row else value[None]

        values = reduction.values if counts is None else reduction.values.where(counts, 0)
        if reduction.kind == "sum":
            return (broadcast(adjoint) * values).sum()
        if reduction.kind == "top":
            return (adjoint * self._picked(part.position, at, values, reduction, cut)).sum()
        lse = part.value if reduction.kind == "lse" else part.lse
        assert lse is not None
        chance = weights_of(values.detach(), broadcast(lse[at]))
        chance = chance if counts is None else chance.where(counts, 0)
        if reduction.kind == "lse":
            return (broadcast(adjoint) * chance * values).sum()
        assert reduction.payload is not None
        payload = reduction.payload if counts is None else reduction.payload.where(counts, 0)
        tilt = broadcast(adjoint) * chance * (payload.detach() - broadcast(part.value[at]))
        return (broadcast(adjoint) * chance * payload).sum() + (tilt * values).sum()

    def _picked(self, position: Tensor | None, at: slice, values: Tensor, reduction: Reduction, cut: Cut) -> Tensor:
        """[n, k]: the entries of a tile that are among the top k, 0 for those that are elsewhere."""
        assert position is not None
        run, comparison = self.evaluation, cut.comparison
        if reduction.axis == "row":
            first = self.offsets[comparison.rows, comparison.columns] + cut.at.start
        else:
            values, rows = values.T, run.known(comparison.rows, cut.i, own=True)
            first = self.offsets[comparison.columns, comparison.rows] + rows.start
        place = position[at] - first
        here = (place >= 0) & (place < values.shape[1])
        if not values.shape[1]:
            return values.new_zeros(place.shape)
        return values.gather(1, place.where(here, 0)).where(here, 0)

    def _inputs(self) -> None:
        """From the adjoints of the per-sample inputs to what they were computed from."""
        if not self.inputs:
            return
        run = self.evaluation
        with torch.enable_grad():
            views = self._views()
            values = run.rule.inputs(run.samples({}, views, {}, {}))
            total = sum((values[key] * self.adjoint[key]).sum() for key in self.inputs)
        assert isinstance(total, Tensor)
        self._take(views, self._grad(total, [*views.values(), *self.learnt]))


def _flat(leaves: Leaves) -> list[Tensor]:
    return [leaf for values in leaves for leaf in values.values() if leaf.requires_grad]


class _Scores:
    """The scores of one tile as something to differentiate: `values` by channel, `leaves` whose gradients `take` wants.

    Inner products are leaves themselves, and their gradient goes to the embeddings by two matrix products; a
    comparison's own score is differentiated to the embeddings of the tile.
    """

    def __init__(self, adjoint: Adjoint, cut: Cut) -> None:
        self.adjoint, self.cut = adjoint, cut
        run = adjoint.evaluation
        self.values = run.products(cut, adjoint.values)
        self.embeddings: list[Tensor] = []
        if cut.comparison.score is not None:
            row_view, column_view = cut.channels[MAIN]
            for view, value in (
                (row_view, adjoint.values[row_view][cut.i]),
                (column_view, cut.blocks[column_view].values[cut.j]),
            ):
                kind = accumulation_type(value.dtype)
                self.embeddings.append(value.detach().to(kind).requires_grad_(run.columns[view].trained))
            self.values[MAIN] = run.own_score(cut, *self.embeddings)
        self.products: list[tuple[str, str]] = []
        self.leaves: list[Tensor] = list(self.embeddings)
        for channel, views in cut.channels.items():
            if channel == MAIN and self.embeddings:
                continue
            if any(run.columns[view].trained for view in views):
                self.products.append(views)
                self.leaves.append(self.values[channel].requires_grad_())

    def take(self, grads: Sequence[Tensor]) -> None:
        """Send the gradients of `leaves` on to the embeddings."""
        into, cut = self.adjoint.embeddings, self.cut
        views = cut.channels[MAIN]
        for number, grad in enumerate(grads[: len(self.embeddings)]):
            if views[number] in into:
                if number == 0:
                    into[views[0]][cut.i] += grad
                else:
                    cut.blocks[views[1]].gradient[cut.j].add_(grad)
        for (row_view, column_view), grad in zip(self.products, grads[len(self.embeddings) :], strict=False):
            rows, block = self.adjoint.values[row_view], cut.blocks[column_view]
            slope = grad.to(block.values.dtype)
            if row_view in into:
                add_product_(into[row_view][cut.i], slope, block.values[cut.j])
            if column_view in into:
                add_product_(block.gradient[cut.j], slope.T, rows[cut.i])
