"""Momentum contrast: negatives are the keys that a slowly moving copy of the towers gave to earlier batches.

    loss_i = logsumexp( l_i, <q_i, k> / tau for k in the queue ) - l_i,   l_i = <q_i, k_i> / tau

q_i is the first view by the towers in training, k_i the second view by the teacher. He et al. 2020, "Momentum Contrast
for Unsupervised Visual Representation Learning", eq. 1 and algorithm 1; with a projection of two layers it is MoCo v2.
`in_batch` adds the keys k_j of the present batch to the sum, and `direction: both` the same loss from the second view
to keys of the first, with a queue of its own (Li et al. 2021, "Align before Fuse").

    contriever  Izacard et al. 2022, "Unsupervised Dense Information Retrieval with Contrastive Learning":
                two crops of a document, tau .05, a queue of 131,072
    infoxlm     Chi et al. 2021, "InfoXLM: An Information-Theoretic Framework for Cross-Lingual Language Model
                Pre-Training": a sentence and its translation, both ways; tau .05, a queue of 131,072. Its mixed
                pairs (two sentences in one) are made by the loader

The queue is the same on all workers and for any number of them, in the checkpoint, and empty at first; what is in it
of a sample's own content is no negative of it. Needs the teacher's embeddings of the keys' views (`teachers` in the
training config, kind ema): view x by teacher t is the view x_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field

from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.engine.side import Side
from cl.memory.queue import Queue
from cl.objectives.base import OBJECTIVES
from cl.objectives.schedule import Scheduled
from cl.objectives.state.momentum import MomentumConfig, MomentumObjective
from cl.pairs import Pairs


class MoCoConfig(MomentumConfig):
    queue: int = Field(65536, ge=1, description="keys that are kept, in samples")
    in_batch: bool = Field(False, description="keys of the present batch are negatives as well")
    direction: Literal["both", "forward"] = Field("forward", description="forward: first view against second alone")
    dimensions: int | None = Field(None, ge=1, description="size of the embeddings; default: the model's")


class ContrieverConfig(MoCoConfig):
    temperature: Scheduled = Field(0.05, description="scores are divided by it")
    queue: int = Field(131072, ge=1, description="keys that are kept, in samples")


class InfoXLMConfig(ContrieverConfig):
    direction: Literal["both", "forward"] = Field("both", description="forward: first view against second alone")


@OBJECTIVES.register(
    "moco",
    "a momentum encoder's keys of earlier batches as negatives",
    paper="Momentum Contrast for Unsupervised Visual Representation Learning",
)
class MoCo(MomentumObjective):
    """See the module's formula."""

    Config = MoCoConfig
    state: ClassVar[tuple[str, ...]] = ("queue",)
    memory: ClassVar[str] = "(batch + queue) x dim"

    def __init__(self, config: MoCoConfig) -> None:
        super().__init__(config, 2 if config.direction == "both" else 1)
        assert config.dimensions is not None
        self.in_batch = config.in_batch
        self.queues = torch.nn.ModuleList(Queue(config.queue, config.dimensions) for _ in range(self.directions))

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        found = []
        for number, (query, key) in enumerate(self.queries(views)):
            found += [(query, f"queue.{number}"), *([(query, key)] if self.in_batch else [])]
        return [*found, *((found[0][0], name) for name in self.extra)]

    def constants(self, pairs: Pairs) -> list[Side]:
        content = pairs.content_columns()
        return [queue.side(f"queue.{number}", content) for number, queue in enumerate(self._queues())]

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        outcome = super().forward(pairs, workers)
        layout = workers.layout(len(pairs), pairs.device)
        for queue, (_, key) in zip(self._queues(), self.queries(list(self.view_names or pairs.views)), strict=True):
            queue.push(pairs.view(key), pairs.content_columns(), pairs.view_weights(key), layout)
        return outcome

    def tile(self, t: Tile) -> Reductions:
        return {"rest": row_lse(self.temperature() * t.scores, over="negatives")}

    def finish(self, s: Samples) -> list[Term]:
        terms = []
        for query, key in self.queries(list(s.views)):
            own = self.temperature() * s.own(query, key)
            terms.append(Term(torch.logaddexp(s["rest", query], own) - own, s.valid(query, key), 1 / self.directions))
        return terms

    def _queues(self) -> list[Queue]:
        return [queue for queue in self.queues if isinstance(queue, Queue)]


@OBJECTIVES.register(
    "contriever",
    "momentum contrast of two crops of a document",
    paper="Unsupervised Dense Information Retrieval with Contrastive Learning",
)
class Contriever(MoCo):
    """See the module's formula."""

    Config = ContrieverConfig


@OBJECTIVES.register(
    "infoxlm",
    "momentum contrast of a sentence and its translation, both ways",
    paper="InfoXLM: An Information-Theoretic Framework for Cross-Lingual Language Model Pre-Training",
)
class InfoXLM(MoCo):
    """See the module's formula."""

    Config = InfoXLMConfig
