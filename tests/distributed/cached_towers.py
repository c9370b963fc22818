"""What the tests of gradient caching under wrappers share: a model with every kind of randomness, and its reference.

The reference needs no wrapper, cache or engine: one process encodes the chunks of all workers with a graph, those of
each worker with its random numbers, and differentiates the formula on whole matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from open_clip.transformer import PatchDropout
from timm.layers import DropPath
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from cl.engine.cache import CachedBatch
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.rule import Reductions, Rule, Samples, Tile, row_lse
from cl.engine.side import sides_of
from cl.engine.tiles import evaluate

FEATURES, TOKENS, WIDTH, CHUNK = 4, 9, 8, 2
CPU = torch.device("cpu")
Chunk = Mapping[str, Tensor]
Encode = Callable[[Chunk], Mapping[str, Tensor]]


class Block(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout, self.path = nn.Dropout(rate), DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.down(self.dropout(torch.tanh(self.up(x)))))


class Tower(nn.Module):
    """Tokens [n, T, F] to [n, D]; patches, activations and paths are dropped at `rate`."""

    def __init__(self, rate: float, checkpointed: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.patches = PatchDropout(rate, exclude_first_token=False)
        self.blocks = nn.ModuleList(Block(rate) for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(self.stem(x))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return normalize(self.head(x.mean(1)), dim=1)


class Model(nn.Module):
    """A picture tower, a text tower that also reads a hard negative for each picture, and a temperature."""

    def __init__(self, rate: float = 0.0, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = Tower(rate, checkpointed), Tower(rate, checkpointed)
        self.log_scale = nn.Parameter(torch.tensor(1.5))
        self.idle = nn.Parameter(torch.ones(2))  # no view uses it
        self.double()

    def forward(self, chunk: Chunk, skip: Collection[str] = ()) -> dict[str, Tensor]:
        tower = {"image": self.image, "text": self.text, "hard": self.text}
        return {view: tower[view](x) for view, x in chunk.items() if view not in skip}


class Ranking(Rule):
    """-log softmax of the own text among all texts and all hard negatives."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def learnt(self) -> Sequence[Tensor]:
        return [self.scale]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [("image", "text"), ("image", "hard")]

    def tile(self, t: Tile) -> Reductions:
        return {"documents": row_lse(self.scale * t.scores)}

    def finish(self, s: Samples) -> Tensor:
        return s["documents"] - self.scale * s.own("image", "text")


def ranking(views: Mapping[str, Tensor], log_scale: Tensor, workers: Workers) -> Outcome:
    weight = torch.ones(len(views["image"]), dtype=views["image"].dtype)
    sides = sides_of(views, workers.layout(len(weight), CPU), weight)
    return Outcome(evaluate(Ranking(log_scale.exp()), sides, workers)[0])


def formula(views: Mapping[str, Tensor], log_scale: Tensor) -> Tensor:
    """The mean of log sum_j exp(s_ij) - s_ii over pictures i; j runs over texts and hard negatives."""
    scores = log_scale.exp() * views["image"] @ torch.cat([views["text"], views["hard"]]).T
    return (scores.logsumexp(1) - scores.diagonal()).mean()


def chunks_of(rank: int, rows: int, step: int = 0) -> list[Chunk]:
    """One worker's part of a step's batch, in chunks; one of no samples where it has none."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    batch = {
        view: torch.randn(rows, TOKENS, FEATURES, generator=generator, dtype=torch.float64)
        for view in ("image", "text", "hard")
    }
    return [{view: x[i : i + CHUNK] for view, x in batch.items()} for i in range(0, max(rows, 1), CHUNK)]


def reference(model: Model, rows: Sequence[int], step: int = 0, encode: Encode | None = None) -> Tensor:
    """Leaves the whole batch's gradients in `.grad` of an unwrapped model and returns the loss."""
    parts = []
    for rank, count in enumerate(rows):
        torch.manual_seed(1000 * step + rank)
        parts += [(model if encode is None else encode)(chunk) for chunk in chunks_of(rank, count, step)]
    loss = formula({view: torch.cat([part[view] for part in parts]) for view in parts[0]}, model.log_scale)
    loss.backward()
    return loss.detach()


def cached(
    call: nn.Module,
    model: Model,
    workers: Workers,
    rows: int,
    step: int = 0,
    singly: bool = False,
    shards: bool = False,
) -> Tensor:
    """The same through the cache: this worker's part of the batch, encoded by `call`, the wrapped `model`.

    Args:
        singly: a forward pass for every view.
        shards: `sharded_gradients`.
    """
    torch.manual_seed(1000 * step + workers.rank)
    batch = CachedBatch(
        call,
        chunks_of(workers.rank, rows, step),
        device=CPU,
        groups=[("image",), ("text",), ("hard",)] if singly else None,
        wrapper=call,
        sharded_gradients=shards,
    )
    outcome = batch.evaluate(lambda views: ranking(views, model.log_scale, workers), [model.log_scale])
    batch.backward()
    return outcome.loss


def apart(found: nn.Module, expected: nn.Module) -> float:
    """The largest difference of any entry of any gradient; no gradient counts as 0."""
    worst = 0.0
    wanted = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        slope, right = parameter.grad, wanted[name].grad
        if isinstance(slope, DTensor):
            slope = slope.full_tensor()
        zero = torch.zeros_like(wanted[name])
        difference = (zero if slope is None else slope) - (zero if right is None else right)
        worst = max(worst, float(difference.abs().max()))
    return worst
