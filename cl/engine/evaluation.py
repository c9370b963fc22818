"""The forward half of evaluating a rule: sweeps that reduce tiles to statistics, and the loss from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cl.engine.collectives import Layout, Workers
from cl.engine.products import accumulation_type, product
from cl.engine.reduction import Reduction, Reductions
from cl.engine.rule import Comparison, Rule, Samples, Term, Tiler
from cl.engine.side import Columns
from cl.engine.statistics import Finished, Key, Part, Running
from cl.engine.sweep import Block, ColumnExchange, Exchange, Tiling
from cl.engine.tile import Tile
from cl.pairs import Clock

MAIN = ""  # the channel of the comparison's own scores


@dataclass(frozen=True)
class Cut:
    """One tile's place: rows `i` and columns `j` of the present blocks; `at` are the same columns among all."""

    comparison: Comparison
    i: slice
    j: slice
    at: slice
    blocks: Mapping[str, Block]  # by column view

    @property
    def channels(self) -> dict[str, tuple[str, str]]:
        """Channel -> (row view, column view), the comparison's own scores first."""
        return {MAIN: (self.comparison.rows, self.comparison.columns), **self.comparison.channels}


@dataclass
class Evaluation:
    """One step of one rule: what does not change between forward and backward."""

    rule: Rule
    columns: dict[str, Columns]  # by view
    sample: Tensor  # [B], the global numbers of this worker's samples
    weight: Tensor  # [B] of the samples
    meta: Mapping[str, Tensor]  # [B, ...] of the samples
    targets: Mapping[str, Tensor]  # [B, N]
    exchange: Exchange
    tiling: Tiling
    workers: Workers  # over whom the loss is a mean
    clock: Clock
    brought: dict[str, ColumnExchange] = field(default_factory=dict)  # by column view

    def comparisons(self) -> list[Comparison]:
        return [Comparison(*each) for each in self.rule.comparisons(list(self.columns))]

    def offsets(self) -> dict[tuple[str, str], int]:
        """(view, other) -> where the numbers of the other's entries begin in the indices of a view's top-k, which may
        span several others and be made of rows as well as of columns: one after the other, as they are compared.
        """
        offsets: dict[tuple[str, str], int] = {}
        totals = dict.fromkeys(self.columns, 0)
        for rows, columns, *_ in self.comparisons():
            for view, other in ((rows, columns), (columns, rows)):
                if (view, other) not in offsets:
                    offsets[view, other] = totals[view]
                    totals[view] += self.columns[other].layout.total
        return offsets

    def groups(self) -> list[tuple[list[str], list[Comparison]]]:
        """Comparisons by column view, so that columns are brought here once: (views to bring, comparisons)."""
        found: dict[str, tuple[list[str], list[Comparison]]] = {}
        for comparison in self.comparisons():
            views, comparisons = found.setdefault(comparison.columns, ([comparison.columns], []))
            views += [column for _, column in comparison.channels.values() if column not in views]
            comparisons.append(comparison)
        return list(found.values())

    def cuts(
        self,
        views: Sequence[str],
        embeddings: Mapping[str, Tensor],
        comparisons: Sequence[Comparison],
        accumulate: bool = False,
    ) -> Iterator[Cut]:
        """Every tile of a sweep over one group of comparisons; it leaves gradients of the trained column `views` where
        `accumulate`.
        """
        sweeps = []
        for view in views:
            if view not in self.brought:
                self.brought[view] = ColumnExchange(embeddings[view], self.columns[view].layout, self.exchange)
            kind = accumulation_type(embeddings[view].dtype) if accumulate and self.columns[view].trained else None
            sweeps.append(self.brought[view].blocks(kind))
        for blocks in zip(*sweeps, strict=True):
            by_view = dict(zip(views, blocks, strict=True))
            for comparison in comparisons:
                block = by_view[comparison.columns]
                rows = len(embeddings[comparison.rows])
                for i, j in self.tiling.shrunk(comparison.cost).cut(rows, len(block.values)):
                    yield Cut(comparison, i, j, slice(block.start + j.start, block.start + j.stop), by_view)

    def known(self, view: str, at: slice, own: bool) -> slice:
        """Rows `at` of this worker (`own`) or of everyone, as a slice of what is known of everyone."""
        start = self.columns[view].layout.local.start if own else 0
        return slice(start + at.start, start + at.stop)

    def scores(self, cut: Cut, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Channel -> scores [R, C] of one tile, without gradient."""
        found = self.products(cut, embeddings)
        if cut.comparison.score is not None:
            right = cut.blocks[cut.comparison.columns].values[cut.j]
            found[MAIN] = self.own_score(cut, embeddings[cut.comparison.rows][cut.i], right)
        return found

    def products(self, cut: Cut, embeddings: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The channels of a tile that are inner products."""
        return {
            channel: product(embeddings[rows][cut.i], cut.blocks[columns].values[cut.j].T)
            for channel, (rows, columns) in cut.channels.items()
            if channel != MAIN or cut.comparison.score is None
        }

    def own_score(self, cut: Cut, left: Tensor, right: Tensor) -> Tensor:
        """The comparison's own function of embeddings, in the accumulation type."""
        comparison = cut.comparison
        assert comparison.score is not None
        rows = self.columns[comparison.rows].known.slice(self.known(comparison.rows, cut.i, own=True), {})
        columns = self.columns[comparison.columns].known.slice(cut.at, {})
        kind = accumulation_type(left.dtype)
        return comparison.score(left.to(kind), right.to(kind), rows, columns)

    def tile(
        self, cut: Cut, scores: Mapping[str, Tensor], rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]
    ) -> Tile:
        """What the rule sees: `rows` and `columns` are the statistics of earlier passes."""
        row_view, column_view = cut.comparison.rows, cut.comparison.columns
        return Tile(
            scores[MAIN],
            row_view,
            column_view,
            self.columns[row_view].known.slice(self.known(row_view, cut.i, own=True), rows),
            self.columns[column_view].known.slice(cut.at, columns),
            {name: value for name, value in scores.items() if name != MAIN},
            {name: value[cut.i, cut.at] for name, value in self.targets.items()},
            self.clock,
        )

    def forward_pass(
        self, tiler: Tiler, embeddings: Mapping[str, Tensor], earlier: Mapping[Key, Finished], last: bool
    ) -> dict[Key, Finished]:
        """Sweep once and finish the statistics of one pass, which no other reads if it is the `last`."""
        running = Running()
        layouts = {view: columns.layout for view, columns in self.columns.items()}
        offsets = self.offsets()
        mine, everyone = self.readable(earlier, "local"), self.readable(earlier, "everyone")
        for views, comparisons in self.groups():
            for cut in self.cuts(views, embeddings, comparisons):
                row_view, column_view = cut.comparison.rows, cut.comparison.columns
                rows, columns = rows_of(mine[row_view], cut.i), rows_of(everyone[column_view], cut.at)
                tile = self.tile(cut, self.scores(cut, embeddings), rows, columns)
                for name, reduction in each(tiler(tile)):
                    by_row = reduction.axis == "row"
                    key = (name, row_view if by_row else column_view)
                    size = len(embeddings[row_view]) if by_row else layouts[column_view].total
                    part = running.part(key, reduction, size)
                    first = offsets[(row_view, column_view) if by_row else (column_view, row_view)]
                    first += cut.at.start if by_row else self.known(row_view, cut.i, own=True).start
                    part.add_(cut.i if by_row else cut.at, reduction, tile.counts(reduction), first)
        return running.finish(layouts, last)

    def readable(
        self, finished: Mapping[Key, Finished], which: Literal["local", "everyone"]
    ) -> dict[str, dict[str, Tensor]]:
        """View -> the values of its statistics as tiles read them, of this worker's rows or of everyone's.

        A masked sample's log-sum-exp is -inf and would turn the slopes of entries that do not count into 0 x inf; it
        reads as 0.
        """
        values: dict[str, dict[str, Tensor]] = {view: {} for view in self.columns}
        for (name, view), done in finished.items():
            columns = self.columns[view]
            weight = columns.local_weight() if which == "local" else columns.known.weight
            part: Part | None = getattr(done, which)
            if part is None:
                continue
            values[view][name] = _without_masked(part.value.detach(), weight)
            if part.position is not None:
                values[view][f"{name}.index"] = part.position
        return values

    def local(self, finished: Mapping[Key, Finished]) -> dict[Key, Tensor]:
        """The value of every statistic for this worker's rows, as `finish` reads it: a masked row's is 0."""
        values = {}
        for (name, view), done in finished.items():
            values[name, view] = _without_masked(done.local.value.detach(), self.columns[view].local_weight())
        return values

    def samples(
        self,
        statistics: Mapping[Key, Tensor],
        embeddings: Mapping[str, Tensor],
        prepared: Mapping[str, Tensor],
        finished: Mapping[Key, Finished],
    ) -> Samples:
        indices = {
            (f"{name}.index", view): done.local.position
            for (name, view), done in finished.items()
            if done.local.position is not None
        }
        present = {
            view: columns.local_weight() > 0
            for view, columns in self.columns.items()
            if columns.side.sample is self.sample
        }
        return Samples({**statistics, **indices}, embeddings, self.meta, present, prepared, self.clock)

    def sums(self, s: Samples) -> tuple[Tensor, Tensor]:
        """Of this worker's samples: each term's weighted sum [T], with gradient, and the weight behind it [T]."""
        result = self.rule.finish(s)
        terms = [Term(result)] if isinstance(result, Tensor) else list(result)
        complete = s.valid()
        parts, totals = [], []
        for term in terms:
            weight = self.weight.to(term.values.dtype) * (complete if term.valid is None else term.valid)
            # Not weight * values: what a masked sample holds may be infinite.
            parts.append(term.factor * (weight * term.values.where(weight > 0, 0)).sum())
            totals.append(weight.sum())
        return torch.stack(parts), torch.stack(totals).detach()

    def means(self, s: Samples) -> tuple[Tensor, Tensor]:
        """Each term's global mean [T], and 1 / the global weight behind it [T], 0 where there is none; no gradient."""
        sums, totals = self.workers.all_reduce_together(self.sums(s))
        inverse = torch.where(totals > 0, 1 / totals.where(totals > 0, 1), 0)
        return sums * inverse, inverse


def each(reductions: Reductions) -> Iterator[tuple[str, Reduction]]:
    """(name, reduction) of everything that a rule made of a tile."""
    for name, value in reductions.items():
        for reduction in [value] if isinstance(value, Reduction) else value:
            yield name, reduction


def rows_of(values: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Some rows of each value."""
    return {name: value[rows] for name, value in values.items()}


def _without_masked(value: Tensor, weight: Tensor) -> Tensor:
    keep = (weight > 0).view(-1, *[1] * (value.dim() - 1)) | value.isfinite()
    return value.where(keep, 0)


def by_layout(keys: Iterable[Key], columns: Mapping[str, Columns]) -> Iterator[tuple[Layout, list[Key]]]:
    """Statistics whose rows lie with the same workers, which travel together."""
    found: dict[Layout, list[Key]] = {}
    for key in keys:
        found.setdefault(columns[key[1]].layout, []).append(key)
    yield from found.items()


def input_statistics(values: Mapping[Key, Tensor], columns: Mapping[str, Columns]) -> dict[Key, Finished]:
    """The per-sample inputs of a rule, in the form of statistics."""
    finished = {}
    for layout, keys in by_layout(values, columns):
        local = [values[key].detach() for key in keys]
        for key, mine, everyone in zip(keys, local, layout.gather_together(local), strict=True):
            finished[key] = Finished(Part("sum", mine), Part("sum", everyone))
    return {key: finished[key] for key in values}
