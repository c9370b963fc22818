"""The shipped recipes: each trains with its own YAML, and what makes it that method is really on."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.transformer import Transformer
from torch.nn.functional import cross_entropy, softplus

from cl.config import parse_config, shipped_configs
from cl.encoders import ModelConfig, build_inputs, build_model, save_model
from cl.engine.collectives import Workers
from cl.objectives import build_objective
from cl.objectives.auxiliary.captioning import Captioning
from cl.objectives.combined.weighted_sum import WeightedSum
from cl.objectives.state.estimator import GlobalContrastive
from cl.pairs import Clock
from cl.recipes import recipe_rows
from tests.distributed.references.noncontrastive import head
from tests.distributed.references.prototypes import sinkhorn
from tests.training_corpus import write_corpus
from tests.unit.recipe_runs import IMAGE, STEPS, TEXT, averaged, clip_loss, nt_xent, run_recipe, unit_rows

HEADS = ("objective.projector=[16, 16, 8]",)
CROPS = ("model.views.crop.size=8", "model.views.crop.copies=3")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "squares")


def test_every_recipe_says_what_it_is_and_is_tested() -> None:
    rows = recipe_rows()
    assert len(rows) >= 12
    assert all(row["summary"] and row["paper"] for row in rows)
    here = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in shipped_configs("recipes") if not re.search(rf'run_recipe\(\s*"{name}"', here)] == []


def test_clip_contrasts_every_picture_with_every_text(corpus: str, tmp_path: Path) -> None:
    seen = run_recipe("clip", corpus, tmp_path / "run", TEXT)
    views = seen.pairs.views
    assert seen.outcome.loss.item() == pytest.approx(
        clip_loss(views["image"], views["text"], seen.state["temperature.log_scale"].exp()).item(), rel=1e-4
    )
    first, last = seen.losses()
    assert last < first - 0.3


def test_siglip_is_a_binary_choice_with_a_bias(corpus: str, tmp_path: Path) -> None:
    seen = run_recipe("siglip", corpus, tmp_path / "run", TEXT)
    views, scale, bias = seen.pairs.views, seen.state["temperature.log_scale"].exp(), seen.state["bias"]
    logits = scale * views["image"] @ views["text"].T + bias
    sign = 2 * torch.eye(len(logits)) - 1
    assert seen.outcome.loss.item() == pytest.approx(softplus(-sign * logits).sum(1).mean().item(), rel=1e-4)
    assert (seen.records[0]["logit_scale"], seen.records[0]["logit_bias"]) == pytest.approx((10, -10), rel=1e-3)
    assert bias != -10
    first, last = seen.losses()
    assert last < first


@pytest.fixture
def image_tower(tmp_path: Path) -> str:
    """Where an image tower comes from: a model of other texts."""
    fields: dict[str, Any] = {"family": "open_clip", "part": "vision", "name": "ViT-B-16"}
    fields["config"] = {"image_size": 16, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
    cfg = parse_config(
        ModelConfig, {"embed_dim": 512, "towers": {"image": fields}, "views": {"image": "image"}}, "test"
    )
    save_model(build_model(cfg, seed=9), cfg, tmp_path / "tower")
    return str(tmp_path / "tower")


def test_lit_keeps_the_image_tower_as_it_came(corpus: str, tmp_path: Path, image_tower: str) -> None:
    seen = run_recipe("lit", corpus, tmp_path / "run", TEXT, f"model.weights.image={image_tower}")
    came = build_model(
        seen.cfg.model.of_views(["image"]).model_copy(update={"weights": image_tower}), seed=0
    ).state_dict()
    assert all(torch.equal(value, seen.weights[0][name]) for name, value in came.items())
    assert not seen.moved("towers.image.")
    assert seen.moved("towers.text.")
    assert not seen.pairs.views["image"].requires_grad
    first, last = seen.losses()
    assert last < first - 0.3


def test_lit_opens_its_image_tower_layer_by_layer(corpus: str, tmp_path: Path, image_tower: str) -> None:
    ramp = 'locked.image.trained_layers={"start": 0, "end": 3, "begin": 0.2, "finish": 0.8}'
    seen = run_recipe("lit", corpus, tmp_path / "run", TEXT, f"model.weights.image={image_tower}", ramp)
    net = "towers.image.net."
    parts = ["proj", "transformer", "conv1"]
    for step, opened in ((20, 0), (21, 1), (30, 1), (31, 2), (40, 2), (41, 3)):  # a third of the ramp opens a layer
        assert [part for part in parts if seen.moved(net + part, step)] == parts[:opened]


def test_flip_reads_half_of_the_patches_until_its_last_part(corpus: str, tmp_path: Path) -> None:
    lengths: list[int] = []

    def watch(module: Any, inputs: tuple[Any, ...]) -> None:
        lengths.append(inputs[0].shape[1])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: watch(module, inputs) if isinstance(module, Transformer) else None
    )
    try:
        seen = run_recipe("flip", corpus, tmp_path / "run", TEXT, "model.towers.image.patch_dropout.finish=0.8")
        pictures = lengths[::2]  # the text tower's come between
        assert pictures == [1 + 8] * 40 + [1 + 16] * 10
        lengths.clear()
        seen.model.towers["image"].follow_(Clock())
        assert seen.model.towers["image"].net.patch_dropout.prob == 0.5
        seen.model.eval().encode("image", torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
        assert lengths == [1 + 16]
    finally:
        handle.remove()
    first, last = seen.losses()
    assert last < first - 0.3


COCA = (
    IMAGE.replace('"layers": 1', '"layers": 1, "attn_pooler_heads": 2, "attn_pooler_queries": 5'),
    TEXT,
    "model.embed_dim=16",
    "objective.terms.caption.objective.vocabulary=600",
    "objective.terms.caption.objective.layers=1",
    "objective.terms.caption.objective.heads=2",
)


def test_coca_writes_the_caption_of_what_it_sees(corpus: str, tmp_path: Path) -> None:
    seen = run_recipe("coca", corpus, tmp_path / "run", *COCA)
    pairs, metrics = seen.pairs, seen.outcome.metrics
    assert pairs.views["image_tokens"].shape == (16, 4, 16)
    assert seen.outcome.loss.item() == pytest.approx(
        metrics["contrast/loss"].item() + 2 * metrics["caption/loss"].item(), rel=1e-5
    )
    objective = build_objective(seen.cfg.objective, 16)
    objective.load_state_dict(seen.state)
    assert isinstance(objective, WeightedSum)
    caption = objective.terms["caption"]
    assert isinstance(caption, Captioning)
    picture, words = pairs.views["image_tokens"].detach(), pairs.views["text_tokens"].detach()
    scores = caption.decoder(picture, words[:, :-1])
    ids, real = pairs.words("text_tokens")
    likelihood = cross_entropy(scores[real[:, 1:]], ids[:, 1:][real[:, 1:]])
    assert metrics["caption/loss"].item() == pytest.approx(likelihood.item(), rel=1e-4)
    assert not torch.allclose(caption.decoder(picture.roll(1, 0), words[:, :-1]), scores, atol=1e-4)
    first, last = seen.losses("caption/loss")
    assert last < first - 1
    # No word is told what comes after it, by the decoder or by the text tower.
    changed = ids.clone()
    changed[:, 6:] = 5
    tower = seen.model.eval().towers["text"]
    told, untold = tower(ids, whole=True).tokens, tower(changed, whole=True).tokens
    assert torch.allclose(told[:, :6], untold[:, :6], atol=1e-5)
    assert not torch.allclose(told[:, 6:], untold[:, 6:], atol=1e-5)
    later = words.clone()
    later[:, 6:] = 0
    assert torch.allclose(caption.decoder(picture, later)[:, :6], caption.decoder(picture, words)[:, :6], atol=1e-5)
    # The caption teaches the image tower.
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    made = seen.model(
        {"image": images, "text": build_inputs(seen.cfg.model, train=False).texts("text", ["a red square"] * 4)}
    )
    caption.decoder(made["image_tokens"], made["text_tokens"]).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in seen.model.towers["image"].net.conv1.parameters())


def test_slip_adds_two_views_that_find_each_other(corpus: str, tmp_path: Path) -> None:
    simclr = "objective.terms.simclr.objective."
    seen = run_recipe(
        "slip", corpus, tmp_path / "run", TEXT, f"{simclr}projector=[16, 16, 8]", f"{simclr}dimensions=16"
    )
    views, metrics = seen.pairs.views, seen.outcome.metrics
    assert views.keys() == {"image", "image_1_features", "image_2_features", "text"}
    state = seen.of("terms.simclr.")
    first, second = (unit_rows(head(views[f"image_{n}_features"], state, "projector")) for n in (1, 2))
    assert not torch.allclose(first, second, atol=1e-2)
    own = nt_xent(first, second, 0.1).item()
    scale = seen.state["terms.clip.temperature.log_scale"].exp()
    both = clip_loss(views["image"], views["text"], scale).item()
    assert metrics["simclr/loss"].item() == pytest.approx(own, rel=1e-3)
    assert seen.outcome.loss.item() == pytest.approx(own + both, rel=1e-3)
    assert seen.losses("simclr/loss")[1] < seen.losses("simclr/loss")[0]


def test_fastclip_keeps_an_estimate_for_every_sample(corpus: str, tmp_path: Path) -> None:
    seen = run_recipe("fastclip", corpus, tmp_path / "run", TEXT)
    objective = build_objective(seen.cfg.objective, 16)
    assert isinstance(objective, GlobalContrastive)
    objective.load_state_dict(seen.state)
    fresh = objective(seen.pairs, Workers()).loss.item()  # as if it had seen none of them before
    assert seen.outcome.loss.item() != pytest.approx(fresh, rel=1e-3)
    tau = 1 / seen.state["temperature.log_scale"].exp()
    logits = seen.pairs.views["image"] @ seen.pairs.views["text"].T / tau
    off = ~torch.eye(16, dtype=torch.bool)
    log_g = [(x - x.diagonal()[:, None])[off].view(16, 15).logsumexp(1) - math.log(15) for x in (logits, logits.T)]
    log_u = torch.stack(log_g).mean().item()
    # Without a history u is g, and the loss tau (1 + rho + mean log u).
    assert fresh == pytest.approx(tau.item() * (1 + 6.5 + log_u), rel=1e-3)


def test_silc_matches_local_crops_with_a_moving_average(corpus: str, tmp_path: Path) -> None:
    inner = "objective.terms.distillation.objective."
    sizes = [f"{inner}{field}" for field in ("dimensions=16", "hidden=16", "bottleneck=8", "prototypes=12")]
    crops = [f"crop_{number}_features" for number in (1, 2, 3)]
    sizes.append(f"{inner}views={json.dumps(['image_features', *crops])}")
    seen = run_recipe("silc", corpus, tmp_path / "run", TEXT, *CROPS, *sizes)
    views, metrics = seen.pairs.views, seen.outcome.metrics
    assert not views["image_features_ema"].requires_grad
    assert not torch.allclose(views["image_features_ema"], views["image_features"], atol=1e-3)
    assert seen.outcome.loss.item() == pytest.approx(
        (metrics["clip/loss"] + metrics["distillation/loss"]).item(), rel=1e-5
    )
    expected, own = averaged(seen, 0.966, "ema", constant=True)
    assert all(torch.allclose(own[name], value, atol=1e-5) for name, value in expected.items())
    assert seen.followed("terms.distillation.slow.module.")
    state, slow = seen.of("terms.distillation."), seen.of("terms.distillation.slow.module.")
    now = {key.removeprefix("head."): value for key, value in state.items() if key.startswith("head.")}
    slow = {key: value + (1 - 0.966) * (now[key] - value) for key, value in slow.items()}
    target = ((dino_head(views["image_features_ema"], slow) - state["centre"]) / 0.04).softmax(1)
    local = [dino_head(views[crop], now) / 0.1 for crop in crops]
    loss = torch.stack([-(target * x.log_softmax(1)).sum(1).mean() for x in local]).mean()
    assert metrics["distillation/loss"].item() == pytest.approx(loss.item(), rel=1e-3)


def dino_head(rows: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Caron et al. 2021, appendix A: three layers, then cosines to the prototypes."""
    for number in (0, 2, 4):
        rows = rows @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
        rows = torch.nn.functional.gelu(rows) if number < 4 else rows
    return unit_rows(rows) @ unit_rows(state["directions"]).T


def test_simclr_finds_the_other_view_among_all_views(corpus: str, tmp_path: Path) -> None:
    seen = run_recipe("simclr", corpus, tmp_path / "run", "model.embed_dim=16", *HEADS)
    views = seen.pairs.views
    assert list(views) == ["image_1_features", "image_2_features"]
    first, second = (unit_rows(head(view, seen.state, "projector")) for view in views.values())
    assert seen.outcome.loss.item() == pytest.approx(nt_xent(first, second, 0.1).item(), rel=1e-3)
    assert not torch.allclose(views["image_1_features"], views["image_2_features"], atol=1e-2)
    start, end = seen.losses()
    assert end < start - 0.1


def test_moco_v3_predicts_what_a_moving_average_sees(corpus: str, tmp_path: Path) -> None:
    seen = run_recipe("moco-v3", corpus, tmp_path / "run", "model.embed_dim=16", *HEADS, "objective.predictor=[16, 8]")
    views, state = seen.pairs.views, seen.state
    queries = [
        unit_rows(head(head(views[f"image_{n}_features"], state, "projector"), state, "predictor")) for n in (1, 2)
    ]
    clock = seen.pairs.clock
    assert seen.followed("slow.module.")
    momentum = 1 - 0.01 * (1 + torch.cos(torch.tensor(torch.pi * clock.progress)).item()) / 2
    slow, now = seen.of("slow.module."), seen.of("projector.")
    slow = {f"projector.{key}": momentum * value + (1 - momentum) * now[key] for key, value in slow.items()}
    keys = [unit_rows(head(views[f"image_{n}_features_ema"], slow, "projector")) for n in (1, 2)]
    own = torch.arange(16)
    each = [0.4 * cross_entropy(q @ k.T / 0.2, own) for q, k in zip(queries, reversed(keys), strict=True)]
    assert seen.outcome.loss.item() == pytest.approx(torch.stack(each).sum().item(), rel=1e-3)
    assert not views["image_1_features_ema"].requires_grad
    expected, average = averaged(seen, 0.99, "ema")
    assert all(torch.allclose(average[name], value, atol=1e-5) for name, value in expected.items())
    assert not seen.moved("towers.image.net.conv1")
    assert seen.moved("towers.image.net.transformer")


def test_swav_predicts_balanced_codes_from_all_crops(corpus: str, tmp_path: Path) -> None:
    sizes = ("model.embed_dim=16", "objective.projector=[16, 8]", "objective.prototypes=12")
    seen = run_recipe("swav", corpus, tmp_path / "run", *CROPS, *sizes)
    views = list(seen.pairs.views.values())
    assert len(views) == 2 + 3
    directions = unit_rows(seen.state["prototypes"])
    scores = [unit_rows(head(view, seen.state, "projector")) @ directions.T for view in views]
    codes = [sinkhorn(score.detach(), 0.05, 3) for score in scores[:2]]
    losses = [
        -(code * (score / 0.1).log_softmax(1)).sum(1).mean()
        for v, code in enumerate(codes)
        for u, score in enumerate(scores)
        if u != v
    ]
    assert seen.outcome.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-3)
    assert seen.losses()[1] < seen.losses()[0]


def test_dino_matches_all_crops_with_a_centred_moving_average(corpus: str, tmp_path: Path) -> None:
    sizes = ("objective.hidden=16", "objective.bottleneck=8", "objective.prototypes=12")
    seen = run_recipe("dino", corpus, tmp_path / "run", "model.embed_dim=16", *CROPS, *sizes)
    views, state, clock = seen.pairs.views, seen.state, seen.pairs.clock
    assert state["centre"].abs().max() > 1e-3
    assert seen.followed("slow.module.")
    momentum = 1 - 0.004 * (1 + torch.cos(torch.tensor(torch.pi * clock.progress)).item()) / 2
    slow, now = seen.of("slow.module."), seen.of("head.")
    slow = {key: momentum * value + (1 - momentum) * now[key] for key, value in slow.items()}
    students = [view for name, view in views.items() if not name.endswith("ema")]
    assert len(students) == 2 + 3
    logits = [dino_head(view, now) / 0.1 for view in students]
    losses = []
    for t in (1, 2):
        target = ((dino_head(views[f"image_{t}_features_ema"], slow) - state["centre"]) / 0.07).softmax(1)
        losses += [-(target * x.log_softmax(1)).sum(1).mean() for s, x in enumerate(logits, 1) if s != t]
    assert seen.outcome.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-3)
    expected, average = averaged(seen, 0.996, "ema")
    assert all(torch.allclose(average[name], value, atol=1e-5) for name, value in expected.items())


def test_mugs_adds_instance_local_group_and_group(corpus: str, tmp_path: Path) -> None:
    inner = "objective.terms.{}.objective.{}"
    sizes = [inner.format("group", field) for field in ("hidden=16", "bottleneck=8", "prototypes=12")]
    sizes += [inner.format("local-group", field) for field in ("queue=64", "memory=64", "heads=2")]
    crops = ("model.views.local.size=8", "model.views.local.copies=3")
    seen = run_recipe("mugs", corpus, tmp_path / "run", "model.embed_dim=16", *crops, *sizes)
    views, metrics = seen.pairs.views, seen.outcome.metrics
    assert list(views) == [
        *("global_1", "global_2", "local_1", "local_2", "local_3"),
        *("global_1_teacher", "global_2_teacher"),
    ]
    terms = [metrics[f"{name}/loss"].item() for name in ("instance", "local-group", "group")]
    assert seen.outcome.loss.item() == pytest.approx(sum(terms), rel=1e-5)
    expected = []
    for n, (query, key) in enumerate((("global_1", "global_2_teacher"), ("global_2", "global_1_teacher"))):
        queue = seen.of(f"terms.instance.queues.{n}.")
        assert int(queue["count"]) > 16 * STEPS / 2
        repeats = (seen.pairs.content[:, None] == queue["content"]).any(-1)
        negatives = (views[query] @ queue["embeddings"].T).masked_fill(repeats | ~queue["filled"], -torch.inf)
        own = (views[query] * views[key]).sum(1, keepdim=True)
        expected.append(((5 * torch.cat([own, negatives], 1)).logsumexp(1) - 5 * own[:, 0]).mean().item())
    assert terms[0] == pytest.approx(sum(expected) / 2, rel=1e-3)  # He et al. 2020, eq. 1, both ways
    assert seen.state["terms.local-group.known.filled"].all()
    assert seen.moved("towers.image")
    slow, average = averaged(seen, 0.996, "teacher")
    assert all(torch.allclose(average[name], value, atol=1e-5) for name, value in slow.items())
