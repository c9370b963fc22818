"""The ranking losses of sentence-transformers, by their signatures.

With scores s = scale x similarity over the documents of the batch (positives and hard negatives alike),

    loss_i = log Z_i - s(q_i, d_i)

and Z_i sums exp s over the chosen directions: query to all documents, query to other queries, document to all queries,
document to the documents of other queries; jointly in one softmax, or averaged over one softmax a direction.
`gather_across_devices` takes the queries and documents of all workers in; gradients are exact after the average that
DDP makes. `similarity_fct` may be `cos_sim` or `dot_score` of sentence_transformers.util.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.rule import Reduction, Reductions, Rule, Samples, Tile, column_lse, row_lse
from cl.engine.side import sides_of
from cl.engine.sweep import Exchange, Tiling
from cl.engine.tiles import evaluate
from cl.errors import ConfigError
from cl.losses.citations import GTE, INFONCE, JINA

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
Hardness = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
HARDNESS = ("in_batch_negatives", "hard_negatives", "all_negatives")
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


@dataclass(frozen=True)
class _Ranking:
    """What both losses are configured by."""

    scale: float
    directions: tuple[str, ...]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float
    similarity: str
    exchange: Exchange

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ConfigError(f"scale must be positive, not {self.scale}.")
        if self.similarity not in ("cos_sim", "dot_score"):
            raise ConfigError(f"similarity_fct must be cos_sim or dot_score, not {self.similarity}.")
        if self.hardness_mode not in (None, *HARDNESS):
            raise ConfigError(
                f"hardness_mode must be None or one of {', '.join(HARDNESS)}, not {self.hardness_mode!r}."
            )
        if not self.hardness_strength >= 0:
            raise ConfigError(f"hardness_strength must be 0 or more, not {self.hardness_strength}.")
        unknown = [name for name in self.directions if name not in DIRECTIONS]
        if unknown or "query_to_doc" not in self.directions:
            raise ConfigError(f"directions must be query_to_doc and others of {', '.join(DIRECTIONS)}.")
        if self.partition_mode not in ("joint", "per_direction"):
            raise ConfigError(f"partition_mode must be joint or per_direction, not {self.partition_mode!r}.")
        if self.partition_mode == "per_direction" and not {*self.directions} <= {"query_to_doc", "doc_to_query"}:
            raise ConfigError(
                "partition_mode per_direction needs the positive in every direction's sum, which query_to_query and "
                "doc_to_doc do not have: use partition_mode joint."
            )

    def loss(self, columns: Sequence[Tensor], workers: Workers) -> Outcome:
        """From embeddings [B, D] of queries, positives and any number of hard negatives."""
        if len(columns) < 2:
            raise ConfigError(f"The loss needs queries and documents, but the batch has {len(columns)} column(s).")
        kind = torch.float64 if columns[0].dtype == torch.float64 else torch.float32
        columns = [normalize(column.to(kind), dim=1) if self.similarity == "cos_sim" else column for column in columns]
        names = ["query", *(f"doc{number}" for number in range(len(columns) - 1))]
        weight = torch.ones(len(columns[0]), dtype=kind, device=columns[0].device)
        layout = workers.layout(len(weight), weight.device)
        sides = sides_of(dict(zip(names, columns, strict=True)), layout, weight)
        value, _ = evaluate(_Rule(self, len(columns) - 1), sides, workers, self.exchange, Tiling())
        return Outcome(value)


class _Rule(Rule):
    def __init__(self, ranking: _Ranking, documents: int) -> None:
        super().__init__()
        self.ranking = ranking
        self.documents = [f"doc{number}" for number in range(documents)]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str]]:
        pairs = [("query", document) for document in self.documents]
        if "query_to_query" in self.ranking.directions:
            pairs.append(("query", "query"))
        if "doc_to_doc" in self.ranking.directions:
            pairs += [("doc0", document) for document in self.documents]
        return pairs

    def tile(self, t: Tile) -> Reductions:
        logits = self.ranking.scale * t.scores
        if t.row_view == "doc0":  # the documents of the same query are left out
            return {"doc_to_doc": row_lse(logits, over="negatives")}
        if t.column_view == "query":
            return {"query_to_query": row_lse(logits)}
        found: dict[str, Reduction | Sequence[Reduction]] = {"query_to_doc": row_lse(self._hardened(t, logits))}
        if t.column_view == "doc0" and "doc_to_query" in self.ranking.directions:
            found["doc_to_query"] = column_lse(logits)
        return found

    def _hardened(self, t: Tile, logits: Tensor) -> Tensor:
        """Lan et al. 2025, eq. 5: negatives weigh more the more similar they are; no gradient through the weight."""
        ranking = self.ranking
        if ranking.hardness_mode is None or ranking.hardness_strength <= 0:
            return logits
        penalty = ranking.hardness_strength * t.scores.detach()
        own_document, positive = t.own, t.column_view == "doc0"
        if ranking.hardness_mode == "in_batch_negatives":
            return logits + penalty.where(~own_document, 0)
        if ranking.hardness_mode == "hard_negatives":
            return logits if positive else logits + penalty.where(own_document, 0)
        return logits + (penalty.where(~own_document, 0) if positive else penalty)

    def finish(self, s: Samples) -> Tensor:
        views = {"query_to_doc": "query", "query_to_query": "query", "doc_to_query": "doc0", "doc_to_doc": "doc0"}
        parts = torch.stack([s[name, views[name]] for name in self.ranking.directions])
        log_z = parts.logsumexp(0) if self.ranking.partition_mode == "joint" else parts.mean(0)
        return log_z - self.ranking.scale * s.own("query", "doc0")


class MultipleNegativesRankingLoss(nn.Module):
    """The loss of `sentence_transformers.losses.MultipleNegativesRankingLoss`, by its signature.

    Its settings are attributes and may be changed between steps, as in the original.

    Raises:
        ConfigError: a setting that is unknown or out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        hardness_mode: Hardness | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.scale, self.similarity_fct = model, scale, similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions, self.partition_mode = tuple(directions), partition_mode
        self.hardness_mode, self.hardness_strength = hardness_mode, hardness_strength
        self._ranking()  # refuses what cannot be computed, before training starts

    def _ranking(self) -> _Ranking:
        return _Ranking(
            self.scale,
            self.directions,
            self.partition_mode,
            self.hardness_mode,
            self.hardness_strength,
            self._similarity(),
            "gather" if self.gather_across_devices else "local",
        )

    def _similarity(self) -> str:
        function = self.similarity_fct
        return "cos_sim" if function is None else getattr(function, "__name__", type(function).__name__)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of the global batch; `labels` are not used, the rows of the columns belong together."""
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self._ranking().loss(columns, Workers.current()).loss

    @property
    def temperature(self) -> float:
        return 1.0 / self.scale

    @property
    def citation(self) -> str:
        """BibTeX of the paper that has these settings, for the model card."""
        if self.partition_mode == "joint" and set(self.directions) == set(DIRECTIONS):
            return GTE
        if self.partition_mode == "per_direction" and set(self.directions) == {"query_to_doc", "doc_to_query"}:
            return JINA
        return INFONCE

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card."""
        return {
            "scale": self.scale,
            "similarity_fct": self._similarity(),
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
        }
