"""The registered metric families on embedded corpora made in memory, against their formulas in float64."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cl.errors import ConfigError
from cl.evaluation.metrics import geometry
from cl.evaluation.metrics.geometry import uniformity, uniformity_of_sphere
from cl.evaluation.registry import METRICS, Figure
from cl.evaluation.run import make_metrics
from tests.unit.embedded import make_embedded, unit_rows

RNG = np.random.default_rng(3)


def figures(found: list[Figure]) -> dict[str, Figure]:
    return {figure.metric: figure for figure in found}


def test_retrieval_with_several_captions_of_an_image() -> None:
    """Two images with two captions each; caption 3 is nearer to the wrong image."""
    images = torch.eye(2)
    texts = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [1.0, 0.9]]), dim=1)
    data = make_embedded(images, texts, [(0, 0), (0, 1), (1, 2), (1, 3)])
    ((_, metric),) = make_metrics("image-text", [{"retrieval": {"k": [1, 2], "examples": 3}}], "test")
    measured = metric.measure(data)
    found = figures(measured.figures)
    assert found["retrieval/image_to_text/R@1"].value == 1.0
    assert found["retrieval/image_to_text/R@1"].chance == pytest.approx(0.5)  # 2 of 4 texts are right
    assert found["retrieval/image_to_text/R@2"].chance == pytest.approx(1 - 2 / 4 * 1 / 3)
    assert found["retrieval/text_to_image/R@1"].value == 0.75
    assert found["retrieval/text_to_image/R@1"].chance == pytest.approx(0.5)
    assert found["retrieval/text_to_image/R@1"].candidates == 2
    assert found["retrieval/text_to_image/median_rank"].value == 1.0
    wrong = [e for e in measured.examples if e.direction == "text_to_image" and e.query == "text 2"]
    assert len([e for e in measured.examples if e.direction == "text_to_image"]) == 3
    assert wrong[0].rank == 1
    assert wrong[0].top == data.ids("image")[::-1]
    assert wrong[0].top_correct == [True, False]


def test_text_retrieval_of_the_identity_is_perfect() -> None:
    vectors = unit_rows(RNG, 30, 8)
    data = make_embedded(vectors, vectors, [(i, i) for i in range(30)], kind="text-text")
    ((_, metric),) = make_metrics("text-text", [{"text_retrieval": {"both": True}}], "test")
    found = figures(metric.measure(data).figures)
    for direction in ("anchor_to_positive", "positive_to_anchor"):
        for name in ("MRR", "nDCG@10", "R@1", "R@10", "median_rank"):
            assert found[f"text_retrieval/{direction}/{name}"].value == 1.0
    assert found["text_retrieval/anchor_to_positive/R@10"].chance == pytest.approx(10 / 30)


@pytest.mark.parametrize("alpha", [2.0, 1.0])
@pytest.mark.parametrize("chunk", [5, 1000])
def test_alignment(alpha: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "ROWS", chunk)
    monkeypatch.setattr(geometry, "COLUMNS", chunk + 2)
    a, b = unit_rows(RNG, 13, 6), unit_rows(RNG, 13, 6)
    data = make_embedded(a, b, [(i, i) for i in range(13)])
    ((_, metric),) = make_metrics("image-text", [{"alignment": {"alpha": alpha}}], "test")
    (figure,) = metric.measure(data).figures
    a64, b64 = a.double().numpy(), b.double().numpy()
    distances = np.linalg.norm(a64[:, None] - b64[None], axis=2) ** alpha
    assert figure.value == pytest.approx(np.mean(np.diag(distances)), rel=1e-9)
    assert figure.chance == pytest.approx(np.mean(distances), rel=1e-6)
    assert not figure.higher_is_better


@pytest.mark.parametrize("chunk", [5, 1000])
def test_uniformity(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "ROWS", chunk)
    monkeypatch.setattr(geometry, "COLUMNS", chunk + 3)
    x = unit_rows(RNG, 23, 4)
    x64 = x.double().numpy()
    squared = ((x64[:, None] - x64[None]) ** 2).sum(axis=2)[np.triu_indices(23, 1)]
    assert uniformity(x, 2.0) == pytest.approx(np.log(np.mean(np.exp(-2.0 * squared))), abs=1e-6)


@pytest.mark.parametrize("dim", [2, 3, 16])
def test_uniformity_of_random_points_is_its_chance(dim: int) -> None:
    x = unit_rows(np.random.default_rng(dim), 4000, dim)
    assert uniformity(x, 2.0) == pytest.approx(uniformity_of_sphere(dim, 2.0), abs=0.02)


def test_uniformity_of_the_sphere_where_the_bessel_function_underflows() -> None:
    values = [uniformity_of_sphere(dim, 2.0) for dim in (64, 128, 256, 512, 1024, 4096)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(-4.0 + 2 * 2.0**2 / 4096, abs=1e-5)  # E exp(2t u) ~ exp((2t)^2 / 2d)


def zero_shot(
    labels: list[str | None], images: torch.Tensor, classes: dict[str, torch.Tensor], **options: object
) -> dict[str, Figure]:
    """Measure with a text encoder that knows each class by the words of its prompt."""
    texts = unit_rows(RNG, len(labels), images.shape[1])
    meta = [json.dumps({"category": label, "keywords": []}) if label else None for label in labels]
    data = replace(
        make_embedded(images, texts, [(i, i) for i in range(len(labels))], meta=meta),
        encode_texts=lambda prompts: torch.stack([classes[p] for p in prompts]),
    )
    ((_, metric),) = make_metrics("image-text", [{"zero_shot": {"label": "category", **options}}], "test")
    measured = metric.measure(data)
    assert measured.notes["without_label"] == sum(label is None for label in labels)
    return figures(measured.figures)


def test_zero_shot_counts_by_class() -> None:
    """Class a: 3 images, 2 right; class b: 1 image, right; one image without a label."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    found = zero_shot(["a", "a", "a", "b", None], torch.stack([a, a, b, b, a]), {"a": a, "b": b}, templates=["{}"])
    assert found["zero_shot/category/top-1"].value == 0.75
    assert found["zero_shot/category/top-1"].chance == 0.5
    assert found["zero_shot/category/top-1"].queries == 4
    assert found["zero_shot/category/mean_per_class"].value == pytest.approx((2 / 3 + 1) / 2)
    assert "zero_shot/category/top-5" not in found  # with two classes it would always be 1


def test_zero_shot_averages_templates_before_comparing() -> None:
    """The second template alone would get both images wrong; the normalised mean gets them right."""
    vectors = {
        "a": torch.tensor([1.0, 0.0]),
        "the a": F.normalize(torch.tensor([0.45, 0.55]), dim=0),
        "b": torch.tensor([0.0, 1.0]),
        "the b": F.normalize(torch.tensor([0.55, 0.45]), dim=0),
    }
    images = torch.stack([vectors["a"], vectors["b"]])
    both = zero_shot(["a", "b"], images, vectors, templates=["{}", "the {}"])
    second = zero_shot(["a", "b"], images, vectors, templates=["the {}"])
    assert both["zero_shot/category/top-1"].value == 1.0
    assert second["zero_shot/category/top-1"].value == 0.0


def test_zero_shot_ties_count_against_the_model() -> None:
    a = torch.tensor([1.0, 0.0])
    found = zero_shot(["a", "b"], torch.stack([a, -a]), {"a": a, "b": a}, templates=["{}"])
    assert found["zero_shot/category/top-1"].value == 0.0


def test_zero_shot_without_classes_says_so() -> None:
    vectors = unit_rows(RNG, 3, 4)
    data = make_embedded(vectors, vectors, [(i, i) for i in range(3)], meta=['{"category": "a"}'] * 3)
    ((_, metric),) = make_metrics("image-text", [{"zero_shot": {"label": "category"}}], "test")
    measured = metric.measure(data)
    assert measured.figures == []
    assert "'category' of 3 samples holds only the class 'a'" in measured.notes["not_measured"]
    ((_, metric),) = make_metrics("image-text", [{"zero_shot": {"label": "kind"}}], "test")
    assert "'kind' of 3 samples holds no class" in metric.measure(data).notes["not_measured"]


def test_lists_of_metrics_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"No metric is called 'retreival'.*Did you mean 'retrieval'"):
        make_metrics("image-text", [{"retreival": {}}], "corpora.x")
    with pytest.raises(ConfigError, match=r"corpora.x: metric retrieval: unknown field 'ks'.*Did you mean 'k'"):
        make_metrics("image-text", [{"retrieval": {"ks": [1]}}], "corpora.x")
    with pytest.raises(ConfigError, match=r"must hold \{\} exactly once"):
        make_metrics("image-text", [{"zero_shot": {"label": "category", "templates": ["an icon"]}}], "corpora.x")
    with pytest.raises(ConfigError, match="no metric of the list"):
        make_metrics("text-text", [{"retrieval": {}}], "corpora.x")


def test_default_metrics_fit_the_kind() -> None:
    assert {name for name, _ in make_metrics("image-text", None, "x")} == {"retrieval", "alignment", "uniformity"}
    assert {name for name, _ in make_metrics("text-text", None, "x")} == {"text_retrieval", "alignment", "uniformity"}


def test_every_metric_has_a_summary() -> None:
    rows = METRICS.rows()
    assert {row["name"] for row in rows} >= {"retrieval", "zero_shot", "alignment", "uniformity", "text_retrieval"}
    assert all(row["summary"] for row in rows)
