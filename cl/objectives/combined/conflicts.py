"""One direction from the gradients of several losses, given their inner products alone.

Every rule here answers with coefficients alpha, the update being sum_k alpha_k g_k, and needs of the gradients g_k only
their Gram matrix G_kl = <g_k, g_l>: K x K numbers that are summed over workers, whatever the size of the g.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rule = Literal["sum", "mgda", "project", "normalise"]


def coefficients(rule: Rule, gram: Tensor, step: int) -> Tensor:
    """alpha [K] from the Gram matrix [K, K] in float64."""
    if rule == "mgda":
        return least_norm(gram)
    if rule == "project":
        return projected(gram, step)
    if rule == "normalise":
        return normalised(gram)
    return torch.ones(len(gram), dtype=gram.dtype, device=gram.device)


def least_norm(gram: Tensor, iterations: int = 250) -> Tensor:
    """The point of least norm in the convex hull of the gradients, a direction that harms no loss.

    Sener and Koltun 2018, "Multi-Task Learning as Multi-Objective Optimization", algorithm 2: Frank-Wolfe with the
    exact step of eq. 4; sum_k alpha_k = 1.
    """
    count = len(gram)
    alpha = torch.full((count,), 1 / count, dtype=gram.dtype, device=gram.device)
    for _ in range(iterations):
        best = int((gram @ alpha).argmin())
        corner = torch.zeros_like(alpha)
        corner[best] = 1
        direction = corner - alpha
        length = direction @ gram @ direction
        if length <= 0:
            break
        step = float((-(alpha @ gram @ direction) / length).clamp(0, 1))
        if step == 0:
            break
        alpha = alpha + step * direction
    return alpha


def projected(gram: Tensor, step: int) -> Tensor:
    """Each gradient without its component against any other that it conflicts with; then their sum.

    Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", algorithm 1, with the others in an order that turns with
    the step instead of at random; for two losses it is the realignment of Wu et al. 2022, "Scaling Multimodal
    Pre-Training via Cross-Modality Gradient Harmonization", eq. 2.
    """
    count = len(gram)
    total = torch.zeros(count, dtype=gram.dtype, device=gram.device)
    for k in range(count):
        mine = torch.zeros_like(total)
        mine[k] = 1
        others = [j for j in range(count) if j != k]
        turn = step % len(others) if others else 0
        for j in others[turn:] + others[:turn]:
            against = mine @ gram[:, j]
            if against < 0 and gram[j, j] > 0:
                mine[j] -= against / gram[j, j]
        total += mine
    return total


def normalised(gram: Tensor) -> Tensor:
    """Each gradient with the mean length of all, so that no loss leads by its scale alone; zeros stay zero."""
    length = gram.diagonal().clamp_min(0).sqrt()
    return torch.where(length > 0, length.mean() / length.where(length > 0, 1), 0)
