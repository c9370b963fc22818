"""When a loss or gradient is no longer a number: what is said (which worker, step and samples), and what is done.

The run stops, or, with `not_finite.action: skip`, leaves the step out: no weight moves, the samples are listed in
OUT/skipped/, and the learning rate rises again from a part of itself. All workers see the same loss and norm, so they
decide alike.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NoReturn

import orjson
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cl.engine.collectives import Workers
from cl.errors import ClewError
from cl.training.config import NotFiniteConfig

SHOWN = 5  # sample ids a worker


class DivergedError(ClewError):
    """Training cannot go on: the loss or the gradient is not finite."""


class Guard:
    """Which steps are taken.

    Args:
        config: what to do.
        out: folder of the run.
        workers: those that compute the loss together.

    Attributes:
        skipped: steps left out so far.
        in_a_row: how many of them were the latest.
        last: the latest of them, 0 if there is none.
    """

    def __init__(self, config: NotFiniteConfig, out: str, workers: Workers) -> None:
        self.config, self.out, self.workers = config, out, workers
        self.skipped = self.in_a_row = self.last = 0

    def accept(self, loss: float, norm: float, step: int, finite: Tensor, ids: Tensor) -> bool:
        """Whether the optimizer may take the step.

        Args:
            loss: the global loss.
            norm: norm of the averaged gradient.
            step: the step both belong to.
            finite: bool [B], whether each local sample's embeddings are finite.
            ids: int64 [B, 2], ids of the local samples.

        Raises:
            DivergedError: on every worker, with one and the same sentence, if the run has to stop.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = 0
            return True
        if self.config.action == "stop" or self.in_a_row == self.config.limit:
            raise_diverged(loss, norm, step, finite, ids, self.workers)
        self.skipped, self.in_a_row, self.last = self.skipped + 1, self.in_a_row + 1, step
        file = Path(self.out) / "skipped" / f"step-{step:08d}.rank-{self.workers.rank}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        bad = [_hex(row) for row in ids[~finite].tolist()]
        what = {"step": step, "loss": str(loss), "grad_norm": str(norm), "not_finite": bad}
        file.write_bytes(orjson.dumps(what | {"ids": [_hex(row) for row in ids.tolist()]}, option=orjson.OPT_INDENT_2))
        return False

    def rate(self, step: int) -> float:
        """What the learning rate of a step is multiplied with: 1, or less in the steps after one that was left out."""
        if not self.last or not self.config.backoff_steps:
            return 1.0
        back = min((step - self.last) / self.config.backoff_steps, 1.0)
        return self.config.backoff + (1 - self.config.backoff) * back

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "last": self.last}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on as the run that gave `state`."""
        self.skipped, self.in_a_row, self.last = state["skipped"], state["in_a_row"], state["last"]


def raise_diverged(loss: float, norm: float, step: int, finite: Tensor, ids: Tensor, workers: Workers) -> NoReturn:
    """Say, with one and the same sentence on every worker, what is not finite."""
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
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [torch.nn.utils.get_total_norm(part) for part in (whole, sharded) if part]
    norm = torch.stack([each.full_tensor() if isinstance(each, DTensor) else each for each in norms]).norm()
    if clip_norm is not None:
        local = [gradient.to_local() for gradient in sharded]
        torch._foreach_mul_([*whole, *local], (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
