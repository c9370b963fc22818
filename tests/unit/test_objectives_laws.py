"""Laws that hold for every registered objective, on one process, with the walk's batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl.engine.collectives import Workers
from cl.objectives import OBJECTIVES
from cl.pairs import Extra, Pairs
from tests.distributed.references import REFERENCES
from tests.distributed.walk import DIMENSIONS, Case, Encoder, build, error, raw_batch

EVERY = [
    pytest.param(name, settings, id=f"{name}-{number}")
    for name, reference in REFERENCES.items()
    for number, settings in enumerate(reference.settings)
]
CASE = Case((9,), "gather", 256, cached=False, hard=False)


def batch_of(name: str, step: int = 1) -> Pairs:
    """The walk's batch for an objective, its embeddings leaves."""
    reference = REFERENCES[name]
    raw = raw_batch(CASE, step, reference)
    embeddings = {
        key: value.detach().requires_grad_(not key.endswith("teacher"))
        for key, value in Encoder()(raw.features).items()
    }
    batch = raw.batch
    extra = {
        key: Extra(
            embeddings[key], more.owner, "negative" if key == "negatives" else "positive", content=more.content[:, None]
        )
        for key, more in batch.extra.items()
    }
    return Pairs(
        {key: embeddings[key] for key in reference.views},
        ids=batch.ids,
        content=batch.content[:, None],
        weight=batch.weight,
        labels=dict(batch.labels),
        present=dict(batch.present),
        tokens=dict(batch.tokens),
        token_ids=dict(batch.token_ids),
        extra=extra,
        targets=dict(batch.targets),
        clock=batch.clock,
    )


def evaluated(objective: nn.Module, pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every view that is trained."""
    loss = objective(pairs, Workers()).loss
    views = {name: view for name, view in pairs.views.items() if view.requires_grad}
    grads = torch.autograd.grad(loss, list(views.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(views, grads, strict=True))


def rows(pairs: Pairs, chosen: Tensor, leaves: bool = True) -> Pairs:
    """The samples `chosen` (a permutation, or a selection) as a batch."""
    place = torch.full((len(pairs),), -1)
    place[chosen] = torch.arange(len(chosen))

    def of(values: Any) -> dict[str, Tensor]:
        return {name: value[chosen] for name, value in values.items()}

    views = {
        name: view.detach()[chosen].requires_grad_(view.requires_grad and leaves) for name, view in pairs.views.items()
    }
    extra = {}
    for name, each in pairs.extra.items():
        kept = place[each.owner] >= 0
        assert each.content is not None
        extra[name] = replace(
            each, embeddings=each.embeddings.detach()[kept], owner=place[each.owner[kept]], content=each.content[kept]
        )
    assert pairs.ids is not None
    assert pairs.weight is not None
    assert pairs.content is not None
    return Pairs(
        views,
        ids=pairs.ids[chosen],
        content=pairs.content[chosen],
        weight=pairs.weight[chosen],
        labels=of(pairs.labels),
        present=of(pairs.present),
        tokens=of(pairs.tokens),
        token_ids=of(pairs.token_ids),
        extra=extra,
        targets={name: value[chosen][:, chosen] for name, value in pairs.targets.items()},
        clock=pairs.clock,
    )


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_permuting_the_batch_permutes_the_gradients(name: str, settings: dict[str, Any]) -> None:
    bound = REFERENCES[name].tolerance
    pairs = batch_of(name)
    loss, grads = evaluated(build(name, settings)["objective"], pairs)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(5))
    moved, moved_grads = evaluated(build(name, settings)["objective"], rows(pairs, order))
    assert error(moved, loss) <= bound
    for view, grad in grads.items():
        assert error(moved_grads[view], grad[order]) <= bound, view


@pytest.mark.parametrize(("name", "settings"), EVERY)
def test_a_masked_sample_changes_nothing(name: str, settings: dict[str, Any]) -> None:
    """What it holds, NaN included, reaches neither the loss nor anybody's gradient, and it gets none itself."""
    bound = REFERENCES[name].tolerance
    pairs = batch_of(name)
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7])
    loss, grads = evaluated(build(name, settings)["objective"], rows(pairs, kept))
    assert pairs.weight is not None
    weight = pairs.weight.clone()
    weight[[3, 8]] = 0
    broken = {}
    for view, value in pairs.views.items():
        holed = value.detach().clone()
        holed[3] = torch.nan
        broken[view] = holed.requires_grad_(value.requires_grad)
    whole = replace(pairs, views=broken, weight=weight)
    masked, masked_grads = evaluated(build(name, settings)["objective"], whole)
    assert error(masked, loss) <= bound
    for view, grad in grads.items():
        assert error(masked_grads[view][kept], grad) <= bound, view
        assert not masked_grads[view][[3, 8]].any(), view


TEMPERED = [param for param in EVERY if "temperature" in OBJECTIVES[str(param.values[0])].Config.model_fields]


@pytest.mark.parametrize(("name", "settings"), TEMPERED)
@pytest.mark.parametrize("temperature", [1e-3, 1e3])
@pytest.mark.parametrize("kind", ["random", "identical", "zero"])
def test_no_nan_at_extreme_temperatures(name: str, settings: dict[str, Any], temperature: float, kind: str) -> None:
    """float32; identical embeddings are what a collapsed model gives, zeros what a dead one gives."""
    pairs = batch_of(name)

    def degenerate(value: Tensor) -> Tensor:
        value = value.detach().float()
        if kind == "identical":
            value = torch.ones_like(value) / DIMENSIONS**0.5
        return value * (kind != "zero")

    views = {view: degenerate(value).requires_grad_(value.requires_grad) for view, value in pairs.views.items()}
    extra = {view: replace(each, embeddings=degenerate(each.embeddings)) for view, each in pairs.extra.items()}
    assert pairs.weight is not None
    labels = {key: value.float() if value.is_floating_point() else value for key, value in pairs.labels.items()}
    targets = {key: value.float() for key, value in pairs.targets.items()}
    pairs = replace(pairs, views=views, extra=extra, weight=pairs.weight.float(), labels=labels, targets=targets)
    fields = {"max_scale": 1000.0} if "max_scale" in OBJECTIVES[name].Config.model_fields else {}
    objective = build(name, {**settings, **fields, "temperature": temperature})["objective"].float()
    loss, grads = evaluated(objective, pairs)
    assert loss.isfinite()
    for view, grad in grads.items():
        assert grad.isfinite().all(), view
