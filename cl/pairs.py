"""The batch contract: what an objective sees of one step.

One `Pairs` holds one worker's part of the global batch. Row i of every view belongs to sample i; everything else
describes the samples in the same order. Whatever an objective needs of other workers, the engine gathers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cl.errors import DataError


@dataclass(frozen=True)
class Clock:
    """Where in the run a step is, for whatever is scheduled: `step` of `total` (from 0), `epoch` of `epochs`."""

    step: int = 0
    total: int = 1
    epoch: int = 0
    epochs: int = 1

    @property
    def progress(self) -> float:
        """The part of the run that is over, in [0, 1]."""
        return min(self.step / max(self.total, 1), 1.0)


@dataclass(frozen=True)
class Extra:
    """Further embeddings that belong to samples, any number each: mined negatives, or more positives.

    Attributes:
        embeddings: [M, D].
        owner: [M] int64, the local row of the sample that each belongs to.
        role: negatives count for every anchor unless their content is the anchor's; positives are right answers of
            their owner and, like any other sample's view, candidates of everybody else.
        weight: [M], 0 masks; None means ones. Those of a masked sample are masked.
        content: [M, K] int64, in the columns of `Pairs.content`; None where unknown.
    """

    embeddings: Tensor
    owner: Tensor
    role: Literal["positive", "negative"] = "negative"
    weight: Tensor | None = None
    content: Tensor | None = None


@dataclass(frozen=True)
class Pairs:
    """Embeddings of one worker's samples, and what is known about the samples.

    Attributes:
        views: name -> embeddings [B, D], or of tokens [B, T, D]; views that are compared have the same D.
        ids: stable 128-bit sample ids as int64 [B, 2], for messages, random numbers and per-sample state.
        content: content ids, int64 [B] or [B, K] (one column a modality: picture, caption). Two samples that agree in
            any column hold the same content: neither is ever the other's negative.
        weight: weight of each sample's terms, [B], not negative; 0 masks a sample (padding, corrupt input) out of
            every sum, as anchor, positive and negative. None means all ones.
        labels: name -> what is known of each sample: classes, sources, clusters or groups as int64 [B], several
            classes as [B, C] of 0 and 1, numbers as float [B] or [B, K], levels of a hierarchy as int64 [B, L].
        present: view -> bool [B], which samples have that modality; a view that is not named has all.
        tokens: view -> bool [B, T], which tokens of a token-wise view are real.
        token_ids: view -> int64 [B, T], the words of a token-wise view of texts, by their numbers.
        extra: name -> further embeddings with their owners.
        targets: name -> [B, N], a value for each local sample and each sample of the global batch, in order of rank.
        clock: where in the run this step is.
    """

    views: Mapping[str, Tensor]
    ids: Tensor | None = None
    content: Tensor | None = None
    weight: Tensor | None = None
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    present: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    token_ids: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Extra] = field(default_factory=dict)
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    clock: Clock = Clock()

    def __post_init__(self) -> None:
        if not self.views:
            raise DataError("A batch needs at least one view.")
        sizes = {name: tuple(view.shape) for name, view in self.views.items()}
        first, rows = next((name, shape[0]) for name, shape in sizes.items())
        for name, shape in sizes.items():
            if len(shape) not in (2, 3):
                raise DataError(
                    f"View {name!r} has shape {list(shape)}; expected [samples, dimensions] or "
                    "[samples, tokens, dimensions]."
                )
            if shape[0] != rows:
                raise DataError(f"View {name!r} has {shape[0]} samples, but view {first!r} has {rows}.")
        for name, value, dims in self._described():
            if value.dim() not in dims or value.shape[0] != rows:
                raise DataError(f"Field {name!r} has shape {list(value.shape)}, but the batch has {rows} samples.")
        for name, mask in self.tokens.items():
            if name not in sizes or tuple(mask.shape) != sizes[name][:2]:
                raise DataError(
                    f"Field 'tokens.{name}' has shape {list(mask.shape)}; expected the samples and tokens of the view, "
                    f"{list(sizes.get(name, ())[:2])}."
                )
        for name, extra in self.extra.items():
            if extra.embeddings.dim() != 2 or tuple(extra.owner.shape) != tuple(extra.embeddings.shape[:1]):
                raise DataError(
                    f"Extra {name!r} has embeddings {list(extra.embeddings.shape)} and owners "
                    f"{list(extra.owner.shape)}; expected [M, dimensions] and [M]."
                )

    def _described(self) -> list[tuple[str, Tensor, tuple[int, ...]]]:
        """(name, value, allowed numbers of dimensions) of everything that has a row for each sample."""
        plain = (("ids", self.ids, (2,)), ("content", self.content, (1, 2)), ("weight", self.weight, (1,)))
        found: list[tuple[str, Tensor, tuple[int, ...]]] = [
            (name, value, dims) for name, value, dims in plain if value is not None
        ]
        found += [(f"labels.{name}", value, (1, 2)) for name, value in self.labels.items()]
        found += [(f"present.{name}", value, (1,)) for name, value in self.present.items()]
        found += [(f"token_ids.{name}", value, (2,)) for name, value in self.token_ids.items()]
        found += [(f"targets.{name}", value, (2,)) for name, value in self.targets.items()]
        return found

    def __len__(self) -> int:
        return next(iter(self.views.values())).shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.views.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of everything that is computed from the embeddings: float64 where they are, else float32."""
        return torch.float64 if next(iter(self.views.values())).dtype == torch.float64 else torch.float32

    def view(self, name: str) -> Tensor:
        """One view's embeddings, with a clear error when it is not there."""
        if name not in self.views:
            raise DataError(f"The batch has no view {name!r}; it has {', '.join(self.views)}.")
        return self.views[name]

    def two_views(self, names: Sequence[str] | None) -> tuple[str, str]:
        """The two views that an objective compares: those named, or the batch's where it has just two.

        Raises:
            DataError: none are named, and the batch has another number of them.
        """
        found = list(names or self.views)
        if len(found) != 2:
            raise DataError(
                f"The objective compares two views, but there are {len(found)} ({', '.join(found)}): name two in its "
                "field views."
            )
        return found[0], found[1]

    def words(self, name: str) -> tuple[Tensor, Tensor]:
        """The words of a token-wise view of texts, int64 [B, T], and which of them are real, bool [B, T]."""
        self.view(name)
        if name not in self.token_ids or name not in self.tokens:
            have = ", ".join(self.token_ids) or "none"
            raise DataError(
                f"The objective needs the words of the view {name!r}, but those that have words are: {have}."
            )
        return self.token_ids[name], self.tokens[name]

    def label(self, name: str) -> Tensor:
        """What is known of each sample by that name, with a clear error when it is not there."""
        if name not in self.labels:
            have = ", ".join(self.labels) or "none"
            raise DataError(f"The objective needs the label {name!r}, but the batch's labels are: {have}.")
        return self.labels[name]

    def weights(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight of each sample [B], ones where none was given."""
        dtype = dtype or self.dtype
        if self.weight is None:
            return torch.ones(len(self), dtype=dtype, device=self.device)
        return self.weight.to(device=self.device, dtype=dtype)

    def view_weights(self, name: str) -> Tensor:
        """The weight of each sample [B] where it has that view, 0 elsewhere."""
        weight = self.weights()
        return weight * self.present[name] if name in self.present else weight

    def content_columns(self) -> Tensor | None:
        """Content ids as [B, K], or None."""
        if self.content is None:
            return None
        return self.content if self.content.dim() == 2 else self.content[:, None]
