"""CLOOB: embeddings are first retrieved from a Hopfield memory of the batch, then contrasted with InfoLOOB.

    U(q)   = retrieved from the first view:  normalised sum_k softmax_k(beta <q, x_k>) x_k;   V(q): from the second
    loss_i = [ log sum_{j != i} e(U(x_i), U(y_j)) - l(U(x_i), U(y_i)) ]
           + [ log sum_{j != i} e(V(y_i), V(x_j)) - l(V(y_i), V(x_i)) ],   l(p, q) = <p, q> / tau, e = exp l

Fuerst et al. 2022, "CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP". tau is constant. The memory holds
the views of all workers' samples; `times_temperature` multiplies the loss by tau, as the authors' code does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from cl.engine.collectives import Workers, gather_rows
from cl.engine.rule import Reductions, Samples, Term, Tile, row_lse
from cl.objectives.base import OBJECTIVES, Outcome
from cl.objectives.schedule import Scheduled
from cl.objectives.tiled import ScaledConfig, ScaledObjective
from cl.pairs import Pairs


class CLOOBConfig(ScaledConfig):
    temperature: Scheduled = Field(1 / 30, description="tau; scores are divided by it")
    learn_temperature: bool = Field(False, description="train the log of the inverse temperature")
    beta: float = Field(
        8.0, ge=0, description="inverse temperature of the retrieval; large: the memory gives the query"
    )
    times_temperature: bool = Field(False, description="multiply the loss by tau")


@OBJECTIVES.register(
    "cloob",
    "InfoLOOB on embeddings retrieved from a modern Hopfield network of the batch",
    paper="CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP",
)
class CLOOB(ScaledObjective):
    """See the module's formula. Parameters: the log of the inverse temperature, if it is trained."""

    Config = CLOOBConfig

    def __init__(self, config: CLOOBConfig) -> None:
        super().__init__(config)
        self.config = config
        self.sources, self.view_names = config.views, None  # tiles compare what is retrieved

    def forward(self, pairs: Pairs, workers: Workers) -> Outcome:
        names = list(self.sources or pairs.views)[:2]
        present = torch.stack([pairs.view_weights(name) > 0 for name in names]).all(0)
        x, y = (pairs.view(name).to(pairs.dtype).where(present[:, None], 0) for name in names)
        layout = workers.layout(len(pairs), pairs.device)
        stored = layout.gather(present)
        memory_x, memory_y = (gather_rows(view, layout)[stored] for view in (x, y))
        retrieved = {
            "x_from_x": self.retrieve(x, memory_x),
            "y_from_x": self.retrieve(y, memory_x),
            "y_from_y": self.retrieve(y, memory_y),
            "x_from_y": self.retrieve(x, memory_y),
        }
        masked = pairs.weights() * present
        return super().forward(replace(pairs, views=retrieved, weight=masked, present={}, tokens={}), workers)

    def retrieve(self, queries: Tensor, memory: Tensor) -> Tensor:
        """[B, D]: what the memory [N, D] gives for each query [B, D]."""
        if not len(queries) or not len(memory):
            return queries + 0 * memory.sum(0)  # the backward of the gathering is a collective that all must join
        q, kv = queries[None, None], memory[None, None]
        return normalize(scaled_dot_product_attention(q, kv, kv, scale=self.config.beta)[0, 0], dim=1)

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        return [("x_from_x", "y_from_x"), ("y_from_y", "x_from_y")]

    def tile(self, t: Tile) -> Reductions:
        return {"rest": row_lse(self.temperature() * t.scores, over="negatives")}

    def finish(self, s: Samples) -> list[Term]:
        scale = self.temperature()
        factor = 1 / scale if self.config.times_temperature else torch.ones_like(scale)
        terms = []
        for anchor, other in (("x_from_x", "y_from_x"), ("y_from_y", "x_from_y")):
            rest = s["rest", anchor]
            terms.append(Term(factor * (rest - scale * s.own(anchor, other)), valid=rest.isfinite()))
        return terms
