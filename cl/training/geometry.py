"""The shape of the embeddings while a run trains: how close pairs are, how the sphere is filled, which scores occur.

    alignment       mean |x - y|^2 over pairs                       } Wang and Isola 2020, "Understanding Contrastive
    uniformity      log mean exp(-2 |x - y|^2) over other samples   } Representation Learning through Alignment and
                                                                      Uniformity on the Hypersphere"
    effective rank  exp H(s / sum s), s the singular values of a view's embeddings (Roy and Vetterli 2007, "The
                    effective rank: A measure of effective dimensionality")
    scores          inner products of pairs and of strangers: means, deviations, and a histogram of each

Computed on the first samples of the global batch, so the numbers do not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from cl.config import Config
from cl.engine.collectives import Workers
from cl.evaluation.metrics.geometry import distance_power, uniformity

BINS = 40  # of scores from -1 to 1


class GeometryConfig(Config):
    """How often the embeddings are looked at, and how many."""

    every_steps: int = Field(100, ge=1, description="steps between two looks")
    samples: int = Field(1024, ge=2, le=8192, description="samples of the global batch that are looked at")


def measure_geometry(
    views: Mapping[str, Tensor], weight: Tensor, content: Tensor, workers: Workers, samples: int
) -> dict[str, Any]:
    """Numbers for the run's record. All workers call this together and get the same.

    Args:
        views: view -> unit embeddings [B, D] of this worker, without gradient; the first two are compared.
        weight: [B], 0 masks.
        content: [B, K] ids; samples that agree in any of them are no strangers.
        samples: how many of the global batch are looked at, the first ones.

    Returns:
        name -> number; `score_histogram` -> counts of pairs and strangers by bin. Empty with fewer than two samples.
    """
    layout = workers.layout(len(weight), weight.device)
    mine = slice(0, max(0, min(samples - layout.local.start, len(weight))))
    chosen = workers.layout(mine.stop, weight.device)
    alive, known, *embeddings = chosen.gather_together(
        [weight[mine], content[mine], *(v[mine] for v in views.values())]
    )
    kept = alive > 0
    if int(kept.sum()) < 2:
        return {}
    found: dict[str, Any] = {}
    whole = {name: value[kept].double() for name, value in zip(views, embeddings, strict=True)}
    for name, value in whole.items():
        found[f"uniformity/{name}"] = uniformity(value, 2.0)
        found[f"effective_rank/{name}"] = effective_rank(value)
    if len(whole) > 1:
        first, second = list(whole.values())[:2]
        found["alignment"] = distance_power(first, second, 2.0)
        found |= _scores(first @ second.T, known[kept])
    return found


def effective_rank(rows: Tensor) -> float:
    """The effective rank of [M, D]: 1 where all rows are alike, at most min(M, D)."""
    values = torch.linalg.svdvals(rows)
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def _scores(scores: Tensor, content: Tensor) -> dict[str, Any]:
    """Scores [M, M] of pairs (the diagonal) and of strangers."""
    strangers = ~(content[:, None] == content).any(-1)
    strangers.fill_diagonal_(False)
    found: dict[str, Any] = {}
    histogram: dict[str, list[int]] = {}
    for name, values in (("positive", scores.diagonal()), ("negative", scores[strangers])):
        if len(values):
            found[f"score/{name}_mean"] = float(values.mean())
            found[f"score/{name}_deviation"] = float(values.std(correction=0))
        counts = torch.histc(values.float().cpu().clamp(-1, 1), BINS, -1, 1)
        histogram[name] = [int(count) for count in counts]
    return found | {"score_histogram": histogram}
