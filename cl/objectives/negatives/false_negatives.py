"""False negatives: candidates that look like positives are left out of the sum, or become positives.

    F_i       = candidates j != i that look like i: q_ij >= threshold, among the k largest q_i., or of the same label
    eliminate   loss_i = logsumexp( l_ij for j not in F_i ) - l_ii
    attract     loss_i = logsumexp( l_ij for all j ) - mean( l_ij for j in {i} and F_i )

l_ij = s_ij / tau. q is the present score without gradient, or, by `teacher`, that of another model. With threshold and
k, both must hold; the label alone suffices. Huynh et al. 2022, "Boosting Contrastive Self-Supervised Learning with
False Negative Cancellation" (scores of a momentum encoder, threshold and k); by the label of a cluster or
of nearest neighbours as in Chen et al. 2022, "Contrastive Test-Time Adaptation". Ties with the k-th largest
count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cl.engine.rule import (
    Comparison,
    Reductions,
    Samples,
    Term,
    Tile,
    Tiler,
    column_lse,
    column_sum,
    column_top,
    row_lse,
    row_sum,
    row_top,
)
from cl.objectives.base import OBJECTIVES
from cl.objectives.negatives.sides import Sides, SidesConfig


class FalseNegativesConfig(SidesConfig):
    threshold: float | None = Field(None, description="score (cosine) from which a candidate looks like a positive")
    k: int | None = Field(None, ge=1, description="the k highest scores of an anchor look like positives")
    label: str | None = Field(None, description="samples that agree in this label look alike")
    teacher: str | None = Field(
        None, description="name t of the model whose scores decide: its embeddings of view x are the view x_t"
    )

    @model_validator(mode="after")
    def _says_what_is_false(self) -> FalseNegativesConfig:
        if self.threshold is None and self.k is None and self.label is None:
            raise ValueError("one of threshold, k and label must say which negatives are false")
        return self


class FalseNegatives(Sides):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    stopped = frozenset({"edge"})

    def __init__(self, config: FalseNegativesConfig) -> None:
        super().__init__(config)
        self.threshold, self.k, self.label, self.teacher = config.threshold, config.k, config.label, config.teacher
        if self.teacher is not None and self.view_names is not None:
            self.view_names = [*self.view_names, *(f"{view}_{self.teacher}" for view in self.view_names)]

    def labels(self) -> list[str]:
        return [] if self.label is None else [self.label]

    def comparisons(self, views: Sequence[str]) -> list[tuple[str, str] | Comparison]:
        if self.teacher is None:
            return list(super().comparisons(views))
        first, second = [view for view in views if not view.endswith(f"_{self.teacher}")][:2]
        found: list[tuple[str, str] | Comparison] = []
        for comparison in super().comparisons([first, second]):
            rows, columns = comparison[:2]
            channel = (f"{rows}_{self.teacher}", f"{columns}_{self.teacher}")
            found.append(comparison if columns in self.extra else Comparison(rows, columns, {"teacher": channel}))
        return found

    def anchors(self, s: Samples) -> list[str]:
        trained = [view for view in s.views if self.teacher is None or not view.endswith(f"_{self.teacher}")]
        return trained[: 2 if self.both else 1]

    def passes(self) -> list[Tiler]:
        return [self.tile] if self.k is None else [self.find, self.tile]

    def judged(self, t: Tile) -> Tensor:
        """[R, C]: the scores that decide."""
        return (t.scores if self.teacher is None else t.channels["teacher"]).detach()

    def find(self, t: Tile) -> Reductions:
        """The k largest scores of every anchor."""
        assert self.k is not None
        if t.columns.role == "negative":
            return {}
        judged = self.judged(t)
        return {"edge": self.ways(t, row_top(judged, self.k), column_top(judged, self.k))}

    def alike(self, t: Tile, edge: Tensor | None) -> Tensor:
        """[R, C] bool: what looks like a positive, for anchors whose k-th largest score is `edge`."""
        found = torch.zeros_like(t.scores, dtype=torch.bool)
        if t.columns.role == "negative":  # mined ones are meant to be negatives
            return found
        judged = self.judged(t)
        if self.threshold is not None or edge is not None:
            found = ~found
        if self.threshold is not None:
            found = found & (judged >= self.threshold)
        if edge is not None:
            found = found & (judged >= edge)
        if self.label is not None:
            found = found | (t.row(self.label) == t.column(self.label))
        return found if t.negatives is None else found & t.negatives

    def sets(self, t: Tile) -> tuple[Tensor, Tensor]:
        """F from the side of the rows and from that of the columns."""
        if self.k is None:
            return self.alike(t, None), self.alike(t, None)
        columns = t.column("edge")[..., -1] if self.both and t.columns.role == "view" else None
        return self.alike(t, t.row("edge")[..., -1]), self.alike(t, columns)


@OBJECTIVES.register(
    "false-negative-elimination",
    "candidates that look like positives are left out of the sum",
    paper="Boosting Contrastive Self-Supervised Learning with False Negative Cancellation",
)
class FalseNegativeElimination(FalseNegatives):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = FalseNegativesConfig

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        rows, columns = self.sets(t)
        return {"lse": self.ways(t, row_lse(logits, mask=~rows), column_lse(logits, mask=~columns))}

    def finish(self, s: Samples) -> list[Term]:
        own = self.positive(s)
        return self.mean(s, [s["lse", view] - own for view in self.anchors(s)])


@OBJECTIVES.register(
    "false-negative-attraction",
    "candidates that look like positives become positives",
    paper="Boosting Contrastive Self-Supervised Learning with False Negative Cancellation",
)
class FalseNegativeAttraction(FalseNegatives):
    """See the module's formula. Parameters: the log of the inverse temperature."""

    Config = FalseNegativesConfig

    def tile(self, t: Tile) -> Reductions:
        logits = self.temperature() * t.scores
        rows, columns = self.sets(t)
        ones = torch.ones_like(logits)
        return {
            "lse": self.ways(t, row_lse(logits), column_lse(logits)),
            "sum": self.ways(t, row_sum(logits, mask=rows), column_sum(logits, mask=columns)),
            "found": self.ways(t, row_sum(ones, mask=rows), column_sum(ones, mask=columns)),
        }

    def finish(self, s: Samples) -> list[Term]:
        own = self.positive(s)
        return self.mean(
            s,
            [s["lse", view] - (own + s["sum", view]) / (1 + s["found", view]) for view in self.anchors(s)],
        )
