"""What a reference formula sees: the whole global batch on one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl.pairs import Clock


@dataclass(frozen=True)
class More:
    """Further embeddings [M, D] of the whole batch with the samples [M] that own them, and their content [M]."""

    embeddings: Tensor
    owner: Tensor
    content: Tensor


@dataclass(frozen=True)
class Batch:
    """A whole global batch of N samples.

    Attributes:
        views: embeddings [N, D] (or of tokens [N, T, D]) by view.
        weight: [N], 0 masks.
        content: [N] content ids.
        ids: [N, 2] sample ids.
        labels: `class` int64 [N]; `levels` int64 [N, 2], coarse to fine; `tags` [N, 4] of 0 and 1; `score` float [N];
            `vector` float [N, 3]; `source` int64 [N]; `cluster` int64 [N]; `time` int64 [N, 2], 0 < t < T.
        present: view -> bool [N].
        tokens: view -> bool [N, T].
        extra: name -> further embeddings: `negatives` and `positives`.
        targets: `soft` [N, N], rows sum to 1.
        clock: the step.
        token_ids: view -> int64 [N, T], the words of token-wise views.
        memory: whatever the reference keeps from step to step; empty at the first.
    """

    views: Mapping[str, Tensor]
    weight: Tensor
    content: Tensor
    ids: Tensor
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    present: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, More] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    token_ids: Mapping[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def own(self) -> Tensor:
        """[N, N]: the diagonal."""
        return torch.eye(len(self.weight), dtype=torch.bool)

    @property
    def same(self) -> Tensor:
        """[N, N]: equal content, the own pair included."""
        return self.content[:, None] == self.content

    @property
    def masked(self) -> Tensor:
        """[N, N]: one of the two samples is masked."""
        out = self.weight == 0
        return out[None] | out[:, None]

    @property
    def excluded(self) -> Tensor:
        """[N, N]: pairs that count nowhere: a masked sample, or equal content other than the own pair."""
        return self.same & ~self.own | self.masked

    @property
    def not_negative(self) -> Tensor:
        """[N, N]: what is no negative: `excluded`, and the own pair."""
        return self.excluded | self.own

    def mean(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """sum_i w_i v_i / sum_i w_i over the samples with `valid`; 0/0 is 0."""
        weight = self.weight if valid is None else self.weight * valid
        total = weight.sum()
        return (weight * values.where(weight > 0, 0)).sum() / (total if total > 0 else 1)


@dataclass(frozen=True)
class Reference:
    """The formula of an objective, with its parameters by name, and the settings to check.

    Attributes:
        loss: from (batch, the objective's parameters by name, settings) to the loss of the global batch.
        settings: fields of the objective's config; each entry is walked.
        views: the views that the batch holds, of `a`, `b`, `c` (trained), `a_teacher`, `b_teacher` (constant),
            `a_tokens`, `b_tokens` (trained, token-wise, with masks).
        extra: further embeddings that the batch holds, of `negatives` and `positives`.
        missing: whether some samples lack view `c` (where the batch has it).
        tolerance: of the relative error; 1e-8 where a matrix is inverted, else 1e-10.
    """

    loss: Callable[[Batch, Mapping[str, Tensor], Mapping[str, Any]], Tensor]
    settings: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    views: tuple[str, ...] = ("a", "b")
    extra: tuple[str, ...] = ()
    missing: bool = False
    tolerance: float = 1e-10
