"""What a metric family is, and the registry of them."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel

from cl.config import Config
from cl.corpus import Kind
from cl.evaluation.items import Embedded
from cl.registry import Registry


class Figure(BaseModel):
    """One number of an evaluation."""

    metric: str  # family/part/name, e.g. retrieval/text_to_image/R@1
    value: float
    chance: float | None  # what embeddings or guesses without knowledge score; None where that means nothing
    higher_is_better: bool
    stderr: float | None = None  # standard error of a share over `queries`
    queries: int | None = None  # how many were asked
    candidates: int | None = None  # among how many


class Example(BaseModel):
    """One query of a retrieval metric with what was found, for people to look at."""

    direction: str  # e.g. text_to_image
    query: str  # its text (for an image: its first caption)
    query_id: str  # sample id
    rank: int  # of the first correct candidate, from 1
    top: list[str]  # sample ids, best first
    top_texts: list[str]
    top_scores: list[float]  # inner products
    top_correct: list[bool]


@dataclass
class Measured:
    """What a metric family found."""

    figures: list[Figure] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)  # e.g. how many samples had no label


O = TypeVar("O", bound=Config)  # noqa: E741 - O for options


class Metric(abc.ABC, Generic[O]):
    """A family of figures computed from the embeddings of a corpus.

    A subclass names the kinds of corpora it applies to, its options (a pydantic model; they are what a config may
    say under its name) and whether it is measured when a config names no metrics.
    """

    kinds: ClassVar[frozenset[Kind]]
    default: ClassVar[bool] = True  # measured when nothing else is asked for
    Options: ClassVar[type[Config]] = Config

    def __init__(self, options: O) -> None:
        self.options = options

    @abc.abstractmethod
    def measure(self, data: Embedded) -> Measured:
        """Compute the figures of one embedded corpus."""


METRICS: Registry[type[Metric[Any]]] = Registry("metric", "cl.evaluation.metrics", "clew.metrics")


def share_error(share: float, count: int) -> float:
    """Standard error of a share of `count` independent queries."""
    return math.sqrt(share * (1.0 - share) / count)
