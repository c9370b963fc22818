"""Learnt vectors of classes, the same on every worker, as columns of a rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl.engine.side import Side
from cl.errors import DataError
from cl.objectives.supervised.labelled import PROTOTYPES
from cl.pairs import Pairs


class ClassPrototypes(nn.Module):
    """`per_class` vectors for each of `classes` classes.

    Attributes:
        vectors: [classes * per_class, D]; those of class c are rows c * per_class to (c + 1) * per_class.
    """

    def __init__(self, classes: int, dimensions: int, per_class: int = 1, normalised: bool = True) -> None:
        super().__init__()
        self.classes, self.per_class, self.normalised = classes, per_class, normalised
        self.vectors = nn.Parameter(normalize(torch.randn(classes * per_class, dimensions), dim=1))

    def side(self, pairs: Pairs, label: str) -> Side:
        """The vectors as columns that know their class.

        Raises:
            DataError: a sample's class has no vector.
        """
        value = pairs.label(label)
        if value.dim() != 1:
            raise DataError(f"The label {label!r} has shape {list(value.shape)}; expected one class a sample.")
        if len(value) and int(value.max()) >= self.classes:
            raise DataError(
                f"The label {label!r} holds class {int(value.max())}, but there are {self.classes} classes."
            )
        vectors: Tensor = normalize(self.vectors, dim=1) if self.normalised else self.vectors
        embeddings = vectors.to(next(iter(pairs.views.values())).dtype)
        number = torch.arange(len(vectors), device=vectors.device)
        return Side(
            PROTOTYPES,
            embeddings,
            torch.full_like(number, -1),
            torch.ones(len(vectors), dtype=pairs.dtype, device=vectors.device),
            meta={label: number // self.per_class},
            replicated=True,
        )
