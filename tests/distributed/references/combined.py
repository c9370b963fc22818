"""References of the objectives that are made of objectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.distributed.references.batch import Batch, Reference
from tests.distributed.references.noncontrastive import alive, followed, head
from tests.distributed.references.pairwise import dcl, infonce, ntxent
from tests.distributed.references.state import moco_v3

TERMS = {"clip": infonce, "dcl": dcl}
WEIGHTS = {"clip": 0.7, "dcl": 1.6}


def term_losses(batch: Batch, parameters: Mapping[str, Tensor], weights: Mapping[str, float]) -> list[Tensor]:
    """The weighted loss of each term, with its own parameters."""
    return [
        weights[name]
        * formula(batch, {key.removeprefix(f"terms.{name}."): p for key, p in parameters.items() if name in key}, {})
        for name, formula in TERMS.items()
    ]


def weighted_sum(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """sum_k w_k L_k; with a rule for conflicts the embeddings get sum_k alpha_k g_k of the gradients by embedding."""
    weights = dict(WEIGHTS)
    if isinstance(settings["terms"]["clip"]["weight"], dict):  # a ramp from 0 to 0.9 over the run
        weights["clip"] = 0.9 * batch.clock.step / batch.clock.total
    if settings.get("gradients", "sum") == "sum":
        return torch.stack(term_losses(batch, parameters, weights)).sum()
    leaves = {name: view.detach().requires_grad_() for name, view in batch.views.items()}
    losses = term_losses(replace(batch, views=leaves), parameters, weights)
    slopes = [torch.autograd.grad(loss, list(leaves.values()), retain_graph=True) for loss in losses]
    first, second = (torch.cat([slope.flatten() for slope in each]) for each in slopes)
    if settings["gradients"] == "mgda":  # Sener and Koltun 2018, eq. 4: the closed form for two gradients
        gamma = float(((second - first) @ second) / ((second - first) @ (second - first)).clamp_min(1e-300))
        gamma = min(max(gamma, 0.0), 1.0)
        alpha = (gamma, 1 - gamma)
        direction = alpha[0] * first + alpha[1] * second
    elif settings["gradients"] == "project":  # Yu et al. 2020, algorithm 1
        against = first @ second
        if against < 0:
            direction = first - against / (second @ second) * second + second - against / (first @ first) * first
        else:
            direction = first + second
    else:
        mean = (first.norm() + second.norm()) / 2
        direction = mean * (first / first.norm() + second / second.norm())
    own = torch.stack(losses).sum()  # the terms' parameters keep their own gradient
    flat = torch.cat([view.flatten() for view in batch.views.values()])
    moved = (flat * direction).sum()
    return own + moved - moved.detach()


def matryoshka(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Kusupati et al. 2022, eq. 1, on CLIP's loss."""
    inner = {key.removeprefix("inner."): value for key, value in parameters.items()}
    total = torch.zeros((), dtype=torch.float64)
    for size, weight in zip(settings["sizes"], settings.get("weights", [1.0] * 9), strict=False):
        views = {name: normalize(view[:, :size], dim=1) for name, view in batch.views.items()}
        total = total + weight * infonce(replace(batch, views=views), inner, {})
    return total


def projected(batch: Batch, parameters: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """Chen et al. 2020 (heads on both views), and 2021, algorithm 1 (a predictor; a slow projector for the keys)."""
    kept = alive(batch)

    def project(view: Tensor, of: Mapping[str, Tensor], *networks: str) -> Tensor:
        made = view[kept]
        for network in networks:
            made = head(made, of, network)
        return torch.zeros(len(batch), made.shape[1], dtype=made.dtype).index_copy(
            0, kept.nonzero()[:, 0], normalize(made, dim=1)
        )

    trained = ("projector", "predictor") if "predictor" in settings else ("projector",)
    views = {name: project(batch.views[name], parameters, *trained) for name in settings["views"]}
    if "teacher_views" in settings:
        slow = followed(batch, parameters, "projector", settings["momentum"])
        views |= {name: project(batch.views[name], slow, "projector").detach() for name in settings["teacher_views"]}
    inner = {"infonce": infonce, "ntxent": ntxent, "moco-v3": moco_v3}[settings["objective"]["name"]]
    of_inner = {key.removeprefix("inner."): value for key, value in parameters.items()}
    return inner(replace(batch, views=views), of_inner, {})


def _terms(clip: Any = WEIGHTS["clip"]) -> dict[str, Any]:
    return {
        "clip": {"objective": {"name": "infonce"}, "weight": clip},
        "dcl": {"objective": {"name": "dcl", "temperature": 0.3}, "weight": WEIGHTS["dcl"]},
    }


REFERENCES: dict[str, Reference] = {
    "sum": Reference(
        weighted_sum,
        [
            {"terms": _terms()},
            {"terms": _terms({"start": 0.0, "end": 0.9})},
            {"terms": _terms(), "gradients": "mgda"},
            {"terms": _terms(), "gradients": "project"},
            {"terms": _terms(), "gradients": "normalise"},
        ],
    ),
    "matryoshka": Reference(
        matryoshka,
        [
            {"objective": {"name": "infonce"}, "sizes": [2, 4, 6]},
            {"objective": {"name": "infonce"}, "sizes": [3, 5], "weights": [0.5, 2.0]},
        ],
    ),
    "projected": Reference(
        projected,
        [
            {"objective": {"name": "ntxent"}, "views": ["a", "b"], "projector": [32, 16]},
            {
                "objective": {"name": "moco-v3"},
                "views": ["a", "b"],
                "projector": [5, 4],
                "predictor": [3, 4],
                "teacher_views": ["a_teacher", "b_teacher"],
                "momentum": 0.9,
            },
        ],
        views=("a", "b", "a_teacher", "b_teacher"),
    ),
}
