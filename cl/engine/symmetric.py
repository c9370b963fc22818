"""Symmetric InfoNCE in one sweep: the fused path of the most common objective.

    s_ij = scale * <a_i, c_j>
    L    = sum_i w_i [ f (lse_j s_ij - s_ii) + (1 - f) (lse_j s_ji - s_ii) ] / sum_i w_i

(van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 4; both directions
as in CLIP, Radford et al. 2021, fig. 3). f is 1/2 for CLIP, 1 for anchors against candidates only.

Rows are the local anchors, columns the candidates of all workers. One tile of s serves both directions: its row
log-sum-exps are complete on this worker, its column log-sum-exps are partial and all-reduced (maximum, then sum
of exponentials). Backward computes each tile again, so memory is O(batch x dim). That is four matrix products a
tile and one side on the wire: candidates are gathered (or circulate, `ring`), their gradients reduce-scattered (or
travel with their block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cl.engine.collectives import Layout, Workers
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
        weight = layout.gather(weight)
        masked = bool((weight == 0).any())
        if content is None:
            return Columns(weight, None, None, first_row, masked)
        content = layout.gather(content)
        repeated = repeated_content(content)
        if not repeated.any():
            return Columns(weight, None, None, first_row, masked)
        return Columns(weight, content, repeated, first_row, masked)

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
class Sweep:
    """One evaluation: whose columns, how they come, how the work is cut, and over whom the loss is a mean."""

    layout: Layout
    exchange: Exchange
    tiling: Tiling
    workers: Workers


class SymmetricInfoNCE(torch.autograd.Function):
    """Returns loss, positive scores [B], row log-sum-exps [B]; see `symmetric_infonce`."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        scale: Tensor,
        columns: Columns,
        sweep: Sweep,
        forward_share: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = sweep.layout
        workers = layout.workers
        kind = accumulation_type(anchors.dtype)
        # A masked sample may hold anything, NaN too: it must not reach a product.
        valid = (columns.weight[layout.local] > 0)[:, None]
        anchors, candidates = anchors.where(valid, 0), candidates.where(valid, 0)
        factor = scale.to(kind)
        row_lse = torch.full((len(anchors),), -torch.inf, dtype=kind, device=anchors.device)
        column_lse = torch.full((layout.total,), -torch.inf, dtype=kind, device=anchors.device)
        with torch.autocast(anchors.device.type, enabled=False):
            positive = factor * (anchors.to(kind) * candidates.to(kind)).sum(1)
            for block in ColumnExchange(candidates, layout, sweep.exchange):
                for i, j in sweep.tiling.cut(len(anchors), len(block.values)):
                    at = slice(block.start + j.start, block.start + j.stop)
                    scores = columns.mask_(product(anchors[i], block.values[j].T).mul_(factor), i, at)
                    row_lse[i] = torch.logaddexp(row_lse[i], scores.logsumexp(1))
                    if forward_share < 1:
                        column_lse[at] = torch.logaddexp(column_lse[at], scores.logsumexp(0))
            if forward_share < 1 and workers.size > 1:
                largest = workers.all_reduce(column_lse.clone(), dist.ReduceOp.MAX)
                shift = largest.where(largest.isfinite(), 0)
                column_lse = workers.all_reduce((column_lse - shift).exp_()).log_().add_(shift)

            weight = columns.weight[layout.local]
            total = sweep.workers.all_reduce(weight.sum())
            share = torch.where(total > 0, weight / total, 0)  # of each local sample in the loss; 0/0 is 0
            terms = forward_share * (row_lse - positive)
            if forward_share < 1:
                terms = terms + (1 - forward_share) * (column_lse[layout.local] - positive)
            loss = sweep.workers.all_reduce(terms.where(weight > 0, 0).mul_(share).sum())
        ctx.save_for_backward(anchors, candidates, factor, row_lse, column_lse, share, total)
        ctx.columns, ctx.sweep, ctx.forward_share, ctx.scale_dtype = columns, sweep, forward_share, scale.dtype
        ctx.mark_non_differentiable(positive, row_lse)
        return loss, positive, row_lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        anchors, candidates, factor, row_lse, column_lse, share, total = ctx.saved_tensors
        columns, sweep, forward_share = ctx.columns, ctx.sweep, ctx.forward_share
        layout: Layout = sweep.layout
        kind = factor.dtype
        # A sample with no valid column has -inf here; its probabilities are 0, not NaN.
        row_lse = row_lse.where(row_lse.isfinite(), torch.inf)
        column_lse = column_lse.where(column_lse.isfinite(), torch.inf)
        row_weight = forward_share * share
        column_weight = (1 - forward_share) * torch.where(total > 0, columns.weight / total, 0)

        d_anchors = torch.zeros(anchors.shape, dtype=kind, device=anchors.device)
        exchange = ColumnExchange(candidates, layout, sweep.exchange, accumulate=kind)
        with torch.autocast(anchors.device.type, enabled=False):
            for block in exchange:
                for i, j in sweep.tiling.cut(len(anchors), len(block.values)):
                    at = slice(block.start + j.start, block.start + j.stop)
                    scores = columns.mask_(product(anchors[i], block.values[j].T).mul_(factor), i, at)
                    slope = (scores - row_lse[i, None]).exp_().mul_(row_weight[i, None])
                    if forward_share < 1:
                        slope += scores.sub_(column_lse[at]).exp_().mul_(column_weight[at])
                    # The positive's own -1, both directions at once, before anything is rounded to a half type.
                    offset = columns.first_row + i.start - at.start
                    own = slope.diagonal(offset)
                    own -= share[i][max(0, -offset) :][: len(own)]
                    slope = slope.to(anchors.dtype)
                    add_product_(d_anchors[i], slope, block.values[j])
                    add_product_(block.gradient[j], slope.T, anchors[i])
            d_candidates = exchange.gradient()
            # sum_ij slope_ij <a_i, c_j> is <a_i, its gradient>: the temperature costs no product of its own.
            d_scale = (anchors.to(kind) * d_anchors).sum()
            factor = factor * grad * sweep.workers.averaged_by
        return (
            (d_anchors * factor).to(anchors.dtype),
            (d_candidates * factor).to(candidates.dtype),
            (d_scale * grad * sweep.workers.averaged_by).to(ctx.scale_dtype),
            None,
            None,
            None,
        )


def symmetric_infonce(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    *,
    layout: Layout,
    weight: Tensor,
    content: Tensor | None = None,
    forward_share: float = 0.5,
    exchange: Exchange = "gather",
    tiling: Tiling,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the global batch, with gradients by the convention of `cl.engine.collectives`.

    Args:
        anchors, candidates: local embeddings [B, D]; row i of both belongs to sample i.
        scale: 0-d, the inverse temperature; receives a gradient.
        layout: the rows of each worker; workers may hold different numbers of rows, or none.
        weight: [B], 0 masks a sample.
        content: [B, K] int64; samples that agree in any column are not each other's negatives.
        forward_share: weight of anchor -> candidates; the rest goes to candidate -> anchors.

    Returns:
        loss (0-d), and without gradient the scaled positive scores [B] and the row log-sum-exps [B].
    """
    workers = layout.workers
    if exchange == "local":  # each worker's negatives are its own; the mean is still over all workers' samples
        layout = Layout(Workers(), (len(anchors),))
    columns = Columns.of(weight.to(accumulation_type(anchors.dtype)), content, layout)
    sweep = Sweep(layout, exchange, tiling, workers)
    return SymmetricInfoNCE.apply(anchors, candidates, scale, columns, sweep, forward_share)
