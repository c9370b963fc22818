"""Objectives on clusters, neighbours and whole lists: their limits, on one process in float64.

That many workers compute the same is the walk's business (`tests/distributed/test_walk.py`).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cl.config import load_config
from cl.engine.collectives import Workers
from cl.errors import ConfigError, DataError
from cl.memory.queue import Queue
from cl.objectives import ObjectiveConfig, build_objective
from cl.objectives.prototypes.neighbours import nearest
from cl.pairs import Clock, Pairs
from cl.training.config import TrainConfig

COUNT, WIDTH = 8, 6


def objective(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return build_objective(ObjectiveConfig.model_validate({"name": name, **fields}), WIDTH).double()


def unit_rows(seed: int, count: int = COUNT) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, WIDTH, generator=generator, dtype=torch.float64), dim=1)


def pairs(seed: int = 0, step: int = 0, **fields: Any) -> Pairs:
    views = {"a": unit_rows(seed).requires_grad_(), "b": unit_rows(seed + 100).requires_grad_()}
    views |= {"a_teacher": unit_rows(seed + 200), "b_teacher": unit_rows(seed + 300)}
    return Pairs(views, clock=Clock(step, 10), **fields)


def loss_of(of: Any, batch: Pairs) -> float:
    return float(of(batch, Workers()).loss.detach())


def test_clusters_begin_once_samples_are_apart_and_then_add_negatives() -> None:
    batch = Pairs({"a": unit_rows(0).requires_grad_(), "b": unit_rows(100)})
    plain = loss_of(objective("infonce", direction="forward", temperature=0.05), batch)
    crowded = objective("clusterns", clusters=3, start=-1.0)
    assert [loss_of(crowded, batch) for _ in range(2)] == pytest.approx([plain, plain])
    assert not crowded.begun
    apart = objective("clusterns", clusters=3, start=1.0, momentum=1.0, margin_weight=0.0)
    first, second, third = (loss_of(apart, batch) for _ in range(3))
    assert first == pytest.approx(plain)
    assert second > plain + 1e-3
    assert third == pytest.approx(second)  # centres of momentum 1 stay


def test_clusters_wait_for_enough_samples() -> None:
    few = objective("clusterns", clusters=COUNT + 1, start=1.0)
    loss_of(few, pairs())
    assert not few.begun


def test_centres_end_in_the_middle_of_their_members() -> None:
    """Two groups far apart: with momentum 0 the centres are the groups' directions after one step."""
    groups = normalize(torch.tensor([[1.0] * 3 + [0.0] * 3, [0.0] * 3 + [1.0] * 3]).double(), dim=1)
    rows = normalize(groups.repeat_interleave(4, 0) + 0.1 * unit_rows(1), dim=1)
    of = objective("clusterns", clusters=2, start=1.0, momentum=0.0)
    for _ in range(2):
        of(Pairs({"a": rows.requires_grad_(), "b": rows.detach()}), Workers())
    expected = normalize(torch.stack([rows[:4].mean(0), rows[4:].mean(0)]), dim=1)
    found = of.centres[(of.centres @ expected.T).argmax(0)]
    torch.testing.assert_close(found, expected.detach())


def test_samples_with_clusters_of_their_own_have_no_loss() -> None:
    of, rows = objective("i-con-cluster", clusters=COUNT, temperature=0.01), unit_rows(0)
    of.directions.data.copy_(rows)
    assert loss_of(of, Pairs({"a": rows, "b": rows})) == pytest.approx(0, abs=1e-3)
    assert loss_of(of, Pairs({"a": rows, "b": rows.roll(1, 0)})) > 1


@pytest.mark.parametrize("name", ["wasserstein", "wasserstein-gaussian"])
def test_wasserstein_is_zero_where_scores_are_the_relevances(name: str) -> None:
    a, b = unit_rows(0).requires_grad_(), unit_rows(1)
    of = objective(name, temperature=0.5, learn_temperature=False)
    loss = of(Pairs({"a": a, "b": b}, targets={"soft": 2 * a.detach() @ b.T}), Workers()).loss
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(loss, a)[0].isfinite().all()


def test_wasserstein_distance_of_each_list() -> None:
    a, b, relevance = unit_rows(0), unit_rows(1), torch.randn(COUNT, COUNT, generator=torch.Generator().manual_seed(3))
    y, p = relevance.double().numpy(), (4 * a @ b.T).softmax(1).numpy()
    q = relevance.double().softmax(1).numpy()
    expected = sum(scipy.stats.wasserstein_distance(y[i], y[i], p[i], q[i]) for i in range(COUNT)) / COUNT
    of = objective("wasserstein", temperature=0.25, learn_temperature=False)
    found = loss_of(of, Pairs({"a": a, "b": b}, targets={"soft": relevance.double()}))
    assert found == pytest.approx(expected, rel=1e-6)


def test_gaussian_wasserstein_by_square_roots_of_matrices() -> None:
    a, b, relevance = unit_rows(0), unit_rows(1), torch.randn(COUNT, COUNT, generator=torch.Generator().manual_seed(3))
    loss = loss_of(
        objective("wasserstein-gaussian", temperature=0.25, learn_temperature=False),
        Pairs({"a": a, "b": b}, targets={"soft": relevance.double()}),
    )
    p, q = (4 * a @ b.T).softmax(1), relevance.double().softmax(1)
    means, covariances = [x.mean(0) for x in (p, q)], [x.T.cov(correction=0).numpy() for x in (p, q)]
    middle = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = float((means[0] - means[1]).square().sum()) + (covariances[0] + covariances[1] - 2 * middle).trace()
    assert loss == pytest.approx(expected, abs=1e-7)


def test_gaussian_wasserstein_does_not_say_which_list_is_whose() -> None:
    """What its documentation warns of: anchors that exchange their lists of relevances leave it as it is."""
    a, b, relevance = unit_rows(0), unit_rows(1), torch.randn(COUNT, COUNT, generator=torch.Generator().manual_seed(3))
    of, by_list = objective("wasserstein-gaussian"), objective("wasserstein")
    batches = [Pairs({"a": a, "b": b}, targets={"soft": y.double()}) for y in (relevance, relevance.roll(1, 0))]
    assert loss_of(of, batches[0]) == pytest.approx(loss_of(of, batches[1]))
    assert loss_of(by_list, batches[0]) != pytest.approx(loss_of(by_list, batches[1]), rel=1e-2)


def test_wasserstein_asks_for_relevances_of_the_whole_batch() -> None:
    batch = Pairs({"a": unit_rows(0), "b": unit_rows(1)}, targets={"soft": torch.rand(COUNT, 3)})
    with pytest.raises(DataError, match=r"targets 'soft' \[8, 8\]"):
        objective("wasserstein")(batch, Workers())


def test_hierarchy_of_one_level_is_multi_similarity() -> None:
    label = torch.arange(COUNT) % 3
    batch = Pairs({"a": unit_rows(0), "b": unit_rows(1)}, labels={"class": label, "levels": label[:, None]})
    plain = loss_of(objective("multi-similarity", epsilon=None), batch)
    assert loss_of(objective("hiprbert"), batch) == pytest.approx(plain)


def test_hierarchy_wants_bases_that_grow() -> None:
    with pytest.raises(ConfigError, match="must not fall from coarse to fine"):
        objective("hiprbert", bases=[0.5, 0.2])
    batch = Pairs({"a": unit_rows(0), "b": unit_rows(1)}, labels={"levels": torch.zeros(COUNT, 2, dtype=torch.int64)})
    with pytest.raises(DataError, match="3 bases of levels"):
        objective("hiprbert", bases=[0.1, 0.2, 0.3])(batch, Workers())


def test_hard_positives_have_the_number_of_their_anchor() -> None:
    """With embeddings that are lines in their numbers, a mixture for y is the point at y."""
    number = torch.linspace(-1, 1, COUNT, dtype=torch.float64)
    line = torch.stack([number, *[torch.ones_like(number)] * 5], 1)
    of = objective("supremix", mixtures=3, window=0.9)
    batch = of.derive(Pairs({"a": line, "b": line}, labels={"score": number}), Workers().layout(COUNT, line.device))
    some = batch.labels["mixed"] > 0
    assert some.tolist() == [False, *[True] * (COUNT - 2), False]
    for m in range(3):
        torch.testing.assert_close(batch.views[f"mixed.{m}.a"][some], line[some])


def test_numbers_are_one_a_sample() -> None:
    batch = Pairs({"a": unit_rows(0), "b": unit_rows(1)}, labels={"score": torch.zeros(COUNT, 2)})
    with pytest.raises(DataError, match="expected one number a sample"):
        objective("supremix")(batch, Workers())


def test_mugs_is_the_sum_of_its_three_terms() -> None:
    """The objective of the shipped recipe, made small, on two global crops, a local one and their teacher's."""
    fields = load_config(TrainConfig, "train", "mugs").objective.model_dump(mode="json")
    small = {"queue": 32, "memory": 32, "heads": 3, "hidden": 7, "prototypes": 9}
    for term in fields["terms"].values():
        term["objective"] |= {key: value for key, value in small.items() if key in term["objective"]}
    whole = objective(**fields)
    alone = {name: copy.deepcopy(term) for name, term in whole.terms.items()}
    assert set(alone) == {"instance", "local-group", "group"}
    for step in range(3):
        views = {name: unit_rows(10 * step + n) for n, name in enumerate(("global_1", "global_2", "local_1"))}
        views |= {f"global_{n}_teacher": unit_rows(10 * step + 3 + n) for n in (1, 2)}
        batch = Pairs(views, clock=Clock(step, 10))
        assert loss_of(whole, batch) == pytest.approx(sum(loss_of(term, batch) for term in alone.values()))


@pytest.mark.parametrize("name", ["all4one", "local-group"])
def test_heads_divide_the_width(name: str) -> None:
    with pytest.raises(ConfigError, match=r"heads \(4\) must divide the width"):
        objective(name, heads=4)


def test_neighbours_of_a_queue_come_by_similarity() -> None:
    queue, known, layout = Queue(5, WIDTH).double(), unit_rows(3, 3), Workers().layout(3, torch.device("cpu"))
    anchors, weight = unit_rows(4), torch.ones(COUNT)
    assert (nearest(queue, anchors, weight, 2) == anchors[:, None]).all()
    queue.push(known, None, torch.ones(3), layout)
    expected = known[(anchors @ known.T).argsort(1, descending=True)[:, :2]]
    torch.testing.assert_close(nearest(queue, anchors, weight, 2), expected)


def test_neighbour_contrast_alone_is_nnclr_with_a_predictor_that_does_nothing() -> None:
    fields = {"queue": 32, "temperature": 0.5, "neighbours": 2, "heads": 2, "predictor": []}
    of = objective("all4one", **fields, neighbour_weight=1.0, centroid_weight=0.0, feature_weight=0.0)
    of.predictor.layers[0].weight.data.copy_(torch.eye(WIDTH))
    of.predictor.layers[0].bias.data.zero_()
    plain = objective("nnclr", queue=32, temperature=0.5, learn_temperature=False)
    for step in range(3):
        batch = pairs(step, step)
        views = {**batch.views, "a_teacher": batch.views["a"].detach(), "b_teacher": batch.views["b"].detach()}
        two = Pairs({"a": batch.views["a"], "b": batch.views["b"]})
        assert loss_of(of, Pairs(views)) == pytest.approx(loss_of(plain, two), rel=1e-6)
