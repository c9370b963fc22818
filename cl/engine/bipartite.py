"""The sweep that the fused losses between two views share: local anchors against the candidates of all workers.

    L = sum_i w_i l_i / sum_i w_i,   l_i a function of scores s_ij = <a_i, c_j>

Rows are this worker's anchors, columns the candidates of all workers. Scores exist a tile at a time. A fused loss
(`symmetric.py`, `sigmoid.py`) says what it makes of a tile and gives back slopes d(L sum w)/d(s_ij), with which this
file does two matrix products. Candidates are gathered (or circulate, `ring`), their gradients reduce-scattered (or
travel with their block), so one side of the batch is on the wire and memory is O(batch x dim).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cl.engine.collectives import Layout, Workers
from cl.engine.products import accumulation_type, add_product_, product, wide
from cl.engine.sweep import ColumnExchange, Exchange, Tiling, repeated_content


@dataclass(frozen=True)
class Columns:
    """What is known of every column (candidate) of the global batch, and of the local rows among them.

    Attributes:
        weight: [N] in the accumulation type; 0 masks.
        content: [N, K] int64 or None: columns that agree with a row in any of K are not its negatives.
        repeated: [N, K] bool, which content ids occur more than once; most tiles have none and skip the comparison.
        first_row: the column of local row 0.
        masked: whether any sample of the batch is masked; most batches have none and skip the mask.
    """

    weight: Tensor
    content: Tensor | None
    repeated: Tensor | None
    first_row: int
    masked: bool

    @staticmethod
    def of(weight: Tensor, content: Tensor | None, layout: Layout) -> Columns:
        """Gather local weights [B] and content ids [B, K]; O(N) memory."""
        first_row = layout.local.start
        weight, *contents = layout.gather_together([weight] if content is None else [weight, content])
        masked = bool((weight == 0).any())
        for content in contents:
            repeated = repeated_content(content)
            if repeated.any():
                return Columns(weight, content, repeated, first_row, masked)
        return Columns(weight, None, None, first_row, masked)

    def mask_(self, scores: Tensor, rows: slice, columns: slice) -> Tensor:
        """Put -inf where a column is no candidate for a row: a masked sample, or the row's own content again."""
        global_rows = slice(self.first_row + rows.start, self.first_row + rows.stop)
        if self.masked:
            scores.masked_fill_(self.weight[columns] == 0, -torch.inf)
            scores.masked_fill_((self.weight[global_rows] == 0)[:, None], -torch.inf)
        if self.content is None or self.repeated is None:
            return scores
        for k in range(self.content.shape[1]):
            i = self.repeated[global_rows, k].nonzero()[:, 0]
            j = self.repeated[columns, k].nonzero()[:, 0]
            if len(i) and len(j):
                same = self.content[global_rows.start + i, k][:, None] == self.content[columns.start + j, k]
                same &= (global_rows.start + i)[:, None] != columns.start + j  # a row's own positive stays
                scores[i[:, None], j] = scores[i[:, None], j].masked_fill(same, -torch.inf)
        return scores


@dataclass(frozen=True)
class Tile:
    """Local anchors `rows` against candidates `columns` of all.

    Attributes:
        number: place in the sweep, the same in every sweep.
        anchors, candidates: [m, D] and [n, D].
        wide: the candidates as scores want them.
        gradient: [n, D], the sum that belongs to the candidates; empty in a sweep without gradients.
        offset: the diagonal on which a row meets its own candidate, as `Tensor.diagonal` counts.
    """

    number: int
    rows: slice
    columns: slice
    anchors: Tensor
    candidates: Tensor
    wide: Tensor
    gradient: Tensor
    offset: int

    def scores(self) -> Tensor:
        """[m, n] in the accumulation type."""
        return product(self.anchors, self.wide.T, widened_from=self.candidates.dtype)

    def own(self, values: Tensor) -> Tensor:
        """The own pairs in [m, n], a view; empty where the tile has none."""
        return values.diagonal(self.offset)

    def own_rows(self, values: Tensor) -> Tensor:
        """Of local values [B], those of the own pairs."""
        first = max(0, -self.offset)
        last = min(self.rows.stop - self.rows.start, self.columns.stop - self.columns.start - self.offset)
        return values[self.rows][first : max(first, last)]


@dataclass(frozen=True)
class Bipartite:
    """One evaluation: whose candidates, how they come, how the work is cut, and over whom the loss is a mean.

    Attributes:
        layout: the rows of the workers whose candidates are seen.
        workers: those whose samples the loss is a mean of; other than the layout's for `local`.
        inverse: 0-d, 1 / sum of all weights; 0 where nobody has any, as 0/0 is 0.
    """

    columns: Columns
    layout: Layout
    exchange: Exchange
    tiling: Tiling
    workers: Workers
    inverse: Tensor

    @staticmethod
    def of(
        weight: Tensor,
        content: Tensor | None,
        layout: Layout,
        exchange: Exchange,
        tiling: Tiling,
    ) -> Bipartite:
        """Tell all workers what they must know of each other's samples."""
        workers = layout.workers
        if exchange == "local":  # each worker's negatives are its own; the mean is still over all workers' samples
            layout = Layout(Workers(), (len(weight),))
        total = workers.all_reduce(weight.sum())
        inverse = torch.where(total > 0, 1 / total, 0)
        tiling = tiling.on(weight.device)
        return Bipartite(Columns.of(weight, content, layout), layout, exchange, tiling, workers, inverse)

    @property
    def weight(self) -> Tensor:
        """[B], of this worker's samples."""
        return self.columns.weight[self.layout.local]

    def clean(self, embeddings: Tensor) -> Tensor:
        """A masked sample may hold anything, NaN too: it must not reach a product."""
        return embeddings.where(self.weight[:, None] > 0, 0) if self.columns.masked else embeddings.detach()

    def mean(self, terms: Tensor) -> Tensor:
        """The weighted mean [] over all workers' samples of local terms [B]."""
        return self.workers.all_reduce((self.weight * terms.where(self.weight > 0, 0)).sum()) * self.inverse

    def bring(self, candidates: Tensor) -> ColumnExchange:
        """The exchange that brings everyone's candidates here, in every sweep of the step."""
        return ColumnExchange(candidates, self.layout, self.exchange)

    def tiles(
        self, anchors: Tensor, candidates: ColumnExchange, accumulate: torch.dtype | None = None
    ) -> Iterator[Tile]:
        """Every tile once; every worker has at least one of each block. See `ColumnExchange.blocks`."""
        number = 0
        for block in candidates.blocks(accumulate):
            band = None
            for i, j in self.tiling.cut(len(anchors), len(block.values)):
                if j != band:
                    band, widened = j, wide(block.values[j])
                at = slice(block.start + j.start, block.start + j.stop)
                offset = self.columns.first_row + i.start - at.start
                yield Tile(number, i, at, anchors[i], block.values[j], widened, block.gradient[j], offset)
                number += 1


class Gradients:
    """Collects the gradients of both sides while a sweep hands in the slopes of each tile.

    Args:
        anchors: this worker's [B, D].
        candidates: as the forward sweep brought them.
        trained: whether the anchors' and the candidates' gradients are wanted; one that is not costs no product. Where
            neither is, the anchors' is computed for the sake of the scale.
    """

    def __init__(self, run: Bipartite, anchors: Tensor, candidates: ColumnExchange, trained: tuple[bool, bool]) -> None:
        self.run, self.anchors, self.candidates = run, anchors, candidates
        self.kind = accumulation_type(anchors.dtype)
        self.to_candidates = trained[1]
        self.to_anchors = trained[0] or not trained[1]
        self.d_anchors = torch.zeros(anchors.shape, dtype=self.kind, device=anchors.device) if self.to_anchors else None

    def tiles(self) -> Iterator[Tile]:
        return self.run.tiles(self.anchors, self.candidates, self.kind if self.to_candidates else None)

    def add_(self, tile: Tile, slope: Tensor) -> None:
        """Take d/d(scores) [m, n] of a tile to both sides; in the embeddings' type, summed in the accumulation type."""
        slope = slope.to(self.anchors.dtype)
        if self.d_anchors is not None:
            add_product_(self.d_anchors[tile.rows], slope, tile.candidates)
        if self.to_candidates:
            add_product_(tile.gradient, slope.T, tile.anchors)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """After the sweep: of the anchors [B, D] and candidates [B, D], and this worker's part of sum_ij slope s_ij."""
        self.candidates.release()
        d_candidates = self.candidates.gradient() if self.to_candidates else None
        # sum_ij slope_ij <a_i, c_j> is <a_i, its gradient>: the temperature costs no product of its own.
        if self.d_anchors is not None:
            return self.d_anchors, d_candidates, (self.anchors * self.d_anchors).sum()
        assert d_candidates is not None
        return None, d_candidates, (self.candidates.values * d_candidates).sum()
