"""The sigmoid loss in one sweep: the fused path of SigLIP.

    x_ij = scale * <a_i, c_j> + bias,   z_ij = 1 for the own pair, -1 for others
    L    = sum_i w_i sum_j log(1 + exp(-z_ij x_ij)) / sum_i w_i

(Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", algorithm 1.) No entry needs to know of another, so
one visit to a tile gives its part of the loss and of the gradients: three matrix products a tile, all in forward;
backward only scales what forward has found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cl.engine.bipartite import Bipartite, Gradients
from cl.engine.collectives import Layout
from cl.engine.products import accumulation_type
from cl.engine.sweep import Exchange, Tiling


class Sigmoid(torch.autograd.Function):
    """Returns the loss; see `sigmoid_loss`."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, candidates: Tensor, scale: Tensor, bias: Tensor, run: Bipartite, train: bool
    ) -> Tensor:
        kind = accumulation_type(anchors.dtype)
        anchors_, candidates_ = run.clean(anchors), run.clean(candidates)
        factor, shift = scale.to(kind), bias.to(kind)
        terms = torch.zeros(len(anchors), dtype=kind, device=anchors.device)
        d_bias = torch.zeros((), dtype=kind, device=anchors.device)
        brought = run.bring(candidates_)
        gradients = Gradients(run, anchors_, brought, ctx.needs_input_grad[:2]) if train else None
        with torch.autocast(anchors.device.type, enabled=False):
            for tile in gradients.tiles() if gradients else run.tiles(anchors_, brought):
                logits = run.columns.mask_(tile.scores().mul_(factor).add_(shift), tile.rows, tile.columns)
                tile.own(logits).neg_()
                terms[tile.rows] += softplus_sums(logits)
                if gradients:
                    slope = logits.sigmoid_().mul_(run.weight[tile.rows, None])
                    tile.own(slope).neg_()
                    d_bias += slope.sum()
                    gradients.add_(tile, slope)
            loss = run.mean(terms)
            if gradients:
                d_anchors, d_candidates, d_scale = gradients.finish()
                ctx.save_for_backward(d_anchors, d_candidates, d_scale, d_bias, factor)
        ctx.run = run
        ctx.dtypes = [value.dtype for value in (anchors, candidates, scale, bias)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *found, factor = ctx.saved_tensors
        outer = grad * ctx.run.inverse * ctx.run.workers.averaged_by
        outers = (outer * factor, outer * factor, outer, outer)
        scaled = [
            None if value is None else (value * by).to(dtype)
            for value, by, dtype in zip(found, outers, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def softplus_sums(logits: Tensor) -> Tensor:
    """sum_j log(1 + exp(x_ij)) [m] of logits [m, n], which may be -inf or of any size, to the digits of the type.

    log(1 + e^x) is max(x, 0) + log(1 + u) with u = e^-|x|. A logarithm of 1 + u is slow where it is to keep a small u,
    so factors are multiplied first, without their 1: (1 + a)(1 + b) - 1 = a + b + ab. All terms are positive, nothing
    cancels, and 64 factors of at most 2 cannot overflow.
    """
    sums = logits.clamp_min(0).sum(1)
    u = logits.abs().neg_().exp_()
    for _ in range(6):
        half = (u.shape[1] + 1) // 2
        head, tail = u[:, :half], u[:, half:]
        if not tail.numel():
            break
        paired = head[:, : tail.shape[1]]
        paired.add_(tail.mul_(paired + 1))
        u = head
    return sums.add_(u.log1p_().sum(1))


def sigmoid_loss(
    anchors: Tensor,
    candidates: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    layout: Layout,
    weight: Tensor,
    content: Tensor | None = None,
    exchange: Exchange = "gather",
    tiling: Tiling,
) -> Tensor:
    """The loss of the global batch (0-d), with gradients by the convention of `cl.engine.collectives`.

    Args:
        anchors, candidates: local embeddings [B, D]; row i of both belongs to sample i.
        scale, bias: 0-d, t and b of the paper; both receive gradients.
        layout: the rows of each worker; workers may hold different numbers of rows, or none.
        weight: [B], 0 masks a sample.
        content: [B, K] int64; samples that agree in any column are not each other's negatives.
    """
    run = Bipartite.of(weight.to(accumulation_type(anchors.dtype)), content, layout, exchange, tiling)
    train = torch.is_grad_enabled() and any(value.requires_grad for value in (anchors, candidates, scale, bias))
    return Sigmoid.apply(anchors, candidates, scale, bias, run, train)
