"""Symmetric InfoNCE in one sweep: the fused path of the most common objective.

    s_ij = scale * <a_i, c_j>
    L    = sum_i w_i [ f (lse_j s_ij - s_ii) + (1 - f) (lse_j s_ji - s_ii) ] / sum_i w_i

(van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 4; both directions
as in CLIP, Radford et al. 2021, fig. 3). f is 1/2 for CLIP, 1 for anchors against candidates only.

Computed as lse_j s_ij - s_ii = log(1 + exp(gap_i)), gap_i = lse_{j != i} s_ij - s_ii, whose slope to s_ii is
-sigmoid(gap_i). Both keep their digits however sure the model is and however large scores are, where a difference of
two large numbers does not.

One tile of s serves both directions: its row log-sum-exps are complete on this worker, its column log-sum-exps are
partial and all-reduced (maximum, then sum of exponentials). Backward needs both of all samples, so it computes the
tiles again, but for those that fit into `Tiling.keep`: three to four matrix products a tile. Where log-sum-exps are not
too far apart, one exponential a score serves both directions, in forward and in backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cl.engine.bipartite import Bipartite, Gradients, Tile
from cl.engine.collectives import Layout
from cl.engine.products import accumulation_type
from cl.engine.sweep import Exchange, Tiling

# e^-40 is nothing beside 1 in float32, and e^40 times any number of candidates does not overflow it.
SPREAD = 40.0


class SymmetricInfoNCE(torch.autograd.Function):
    """Returns loss, positive scores [B], row log-sum-exps [B]; see `symmetric_infonce`."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, candidates: Tensor, scale: Tensor, run: Bipartite, forward_share: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = run.layout
        kind = accumulation_type(anchors.dtype)
        anchors, candidates = run.clean(anchors), run.clean(candidates)
        factor = scale.to(kind)
        kept: dict[int, Tensor] = {}  # by number of the tile
        brought = run.bring(candidates)
        room = run.tiling.keep * 2**20 if any(ctx.needs_input_grad) else 0
        with torch.autocast(anchors.device.type, enabled=False):
            own = factor * (anchors.to(kind) * candidates.to(kind)).sum(1)
            everyone = layout.gather(own)
            row_gap, column_gap = torch.full_like(own, -torch.inf), torch.full_like(everyone, -torch.inf)
            for tile in run.tiles(anchors, brought):
                i, j = tile.rows, tile.columns
                scores = _others(run, tile, factor)
                if scores.nbytes <= room:
                    room -= scores.nbytes
                    kept[tile.number] = scores
                rows, columns = gaps(scores, own[i], everyone[j])
                row_gap[i] = torch.logaddexp(row_gap[i], rows)
                column_gap[j] = torch.logaddexp(column_gap[j], columns)
            if forward_share < 1 and layout.workers.size > 1:
                largest = layout.workers.all_reduce(column_gap.clone(), dist.ReduceOp.MAX)
                shift = largest.where(largest.isfinite(), 0)
                column_gap = layout.workers.all_reduce((column_gap - shift).exp_()).log_().add_(shift)
            row_loss, column_loss = _softplus(row_gap), _softplus(column_gap)
            loss = run.mean(forward_share * row_loss + (1 - forward_share) * column_loss[layout.local])
            pull = forward_share * row_gap.sigmoid() + (1 - forward_share) * column_gap[layout.local].sigmoid()
        ctx.save_for_backward(anchors, factor, own, everyone, row_loss, column_loss, pull)
        ctx.run, ctx.brought, ctx.kept = run, brought, kept
        ctx.forward_share, ctx.dtypes = forward_share, (candidates.dtype, scale.dtype)
        positive, row_lse = own.clone(), own + row_loss
        ctx.mark_non_differentiable(positive, row_lse)
        return loss, positive, row_lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        anchors, factor, own, everyone, row_loss, column_loss, pull = ctx.saved_tensors
        run: Bipartite = ctx.run
        # f w_i p_ij is exp(s_ij - s_ii - row_i) with the weight in row_i, which is inf without weight; columns alike.
        row = row_loss - (ctx.forward_share * run.weight).log()
        column = column_loss - ((1 - ctx.forward_share) * run.columns.weight).log()
        middle = _middle(own + row, everyone + column)
        if middle is not None:
            row, column = (middle - own - row).exp_(), (middle - everyone - column).exp_()
        gradients = Gradients(run, anchors, ctx.brought, ctx.needs_input_grad[:2])
        with torch.autocast(anchors.device.type, enabled=False):
            for tile in gradients.tiles():
                i, j = tile.rows, tile.columns
                scores = ctx.kept[tile.number] if tile.number in ctx.kept else _others(run, tile, factor)
                if middle is not None:
                    slope = (scores - middle).exp_().mul_(row[i, None] + column[j])
                else:
                    slope = (scores - own[i, None]).sub_(row[i, None]).exp_()
                    slope += (scores - everyone[j]).sub_(column[j]).exp_()
                tile.own(slope).copy_(-tile.own_rows(run.weight * pull))
                gradients.add_(tile, slope)
            d_anchors, d_candidates, d_scale = gradients.finish()
            outer = grad * run.inverse * run.workers.averaged_by
        return (
            None if d_anchors is None else d_anchors.mul_(factor * outer).to(anchors.dtype),
            None if d_candidates is None else d_candidates.mul_(factor * outer).to(ctx.dtypes[0]),
            (d_scale * outer).to(ctx.dtypes[1]),
            None,
            None,
        )


def _others(run: Bipartite, tile: Tile, factor: Tensor) -> Tensor:
    """The scores of a tile; -inf where a pair is none, or is the own pair, which is treated apart."""
    scores = run.columns.mask_(tile.scores().mul_(factor), tile.rows, tile.columns)
    tile.own(scores).fill_(-torch.inf)
    return scores


def gaps(scores: Tensor, own_rows: Tensor, own_columns: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of the rows [m] and columns [n] of scores, less the own score of each row and column.

    One exponential a score serves both. Differences of scores are taken before logarithms are added, so that a common
    size of all scores costs no digits. A score may be -inf.
    """
    if not scores.numel():
        return scores.logsumexp(1), scores.logsumexp(0)
    largest = scores.amax(1)
    shift = largest.where(largest.isfinite(), 0)
    powers = (scores - shift[:, None]).exp_()
    top = shift.max()
    sums = (shift - top).exp_() @ powers
    columns = sums.log() + (top - own_columns)
    # A column far below the best of all rows has lost its digits: such are summed by themselves.
    faint = (sums < math.exp(-SPREAD)).nonzero()[:, 0]
    if len(faint):
        columns[faint] = (scores[:, faint] - own_columns[faint]).logsumexp(0)
    return powers.sum(1).log_().add_(shift - own_rows), columns


def _softplus(values: Tensor) -> Tensor:
    """log(1 + exp(x)), to the digits of the type for any x; torch's own is cut off at 20."""
    return torch.logaddexp(values, torch.zeros_like(values))


def _middle(row: Tensor, column: Tensor) -> Tensor | None:
    """A number from which none of the finite log-sum-exps is far, if there is one."""
    every = torch.cat([row, column])
    every = every[every.isfinite()]
    if not len(every):
        return None
    least, most = every.aminmax()
    return (least + most) / 2 if most - least < SPREAD else None


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
    weight = weight.to(accumulation_type(anchors.dtype))
    run = Bipartite.of(weight, content, layout, exchange, tiling)
    return SymmetricInfoNCE.apply(anchors, candidates, scale, run, forward_share)
