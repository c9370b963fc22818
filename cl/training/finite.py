"""What is said when a loss or gradient is no longer a number: which worker, which step, which samples."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from cl.engine.collectives import Workers
from cl.errors import ClewError

SHOWN = 5  # sample ids a worker


class DivergedError(ClewError):
    """Training cannot go on: the loss or the gradient is not finite."""


def check_finite(loss: float, norm: float, step: int, finite: Tensor, ids: Tensor, workers: Workers) -> None:
    """Raise on every worker, with one and the same sentence, if the loss or the gradient's norm is not finite.

    Both numbers are the same on all workers, so all of them enter the exchange or none does.

    Args:
        loss: the global loss.
        norm: norm of the averaged gradient.
        step: the step both belong to.
        finite: bool [B], whether each local sample's embeddings are finite.
        ids: int64 [B, 2], ids of the local samples.
        workers: those that compute the loss together.

    Raises:
        DivergedError: naming step, workers and samples.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    bad = [_hex(row) for row in ids[~finite].tolist()]
    mine = {"worker": workers.rank, "bad": len(bad), "of": len(finite), "ids": bad[:SHOWN]}
    found: list[dict] = [mine] * workers.size
    if workers.size > 1:
        dist.all_gather_object(found, mine, group=workers.group)
    named = [
        f"worker {each['worker']}: {each['bad']} of {each['of']} samples, ids {', '.join(each['ids'])}"
        + (", ..." if each["bad"] > len(each["ids"]) else "")
        for each in found
        if each["bad"]
    ]
    if named:
        where = f"the embeddings of these samples are not finite: {'; '.join(named)}"
    else:
        first = ([_hex(row) for row in ids[:SHOWN].tolist()] + [""] * SHOWN)[:SHOWN]
        if workers.size > 1:  # one sentence for all
            dist.broadcast_object_list(first, group=workers.group, group_src=0)
        where = (
            "all embeddings are finite, so it arose in the loss or on the way back "
            f"(the first samples of worker 0: {', '.join(filter(None, first))})"
        )
    raise DivergedError(
        f"The loss is {loss} and the gradient's norm {norm} at step {step}; {where}. "
        "Lower optimizer.lr, lengthen schedule.warmup_steps or look at those samples."
    )


def _hex(words: list[int]) -> str:
    """The 128-bit id of two signed 64-bit words as 32 hex digits."""
    return "".join(f"{word & (2**64 - 1):016x}" for word in words)


def gradient_norm(parameters: list[torch.nn.Parameter], clip_norm: float | None) -> Tensor:
    """The 2-norm of all gradients, 0-d; they are scaled down in place where it exceeds `clip_norm`.

    Call it when the gradients are averaged over the workers: the norm is then that of the global gradient.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm
