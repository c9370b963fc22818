"""Teachers: what they embed, how they follow, and what a config may ask of them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cl.config import dump_config, parse_config
from cl.encoders import EncoderModel, ModelConfig, build_inputs, build_model, load_checkpoint_model, save_model
from cl.encoders.teacher import EmaTeacherConfig, FrozenTeacherConfig, build_teachers, with_teachers
from cl.errors import ConfigError
from cl.training.config import TrainConfig
from tests.training_corpus import TINY_MODEL, tiny_run
from tests.unit.corpora import encoded_image

VIEWS = {"image": "image", "strong": {"tower": "image", "of": "image", "augment": "simclr"}, "text": "text"}


def model_config(**changes: Any) -> ModelConfig:
    return parse_config(ModelConfig, copy.deepcopy(TINY_MODEL) | {"views": VIEWS} | changes, "test")


def ema(**fields: Any) -> EmaTeacherConfig:
    return EmaTeacherConfig(kind="ema", **fields)


def pictures(size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_an_average_follows_the_towers_by_the_papers_recursion(schedule: str) -> None:
    """MoCo's eq. 2 with BYOL's m(k) = 1 - (1 - m_0)(cos(pi k / K) + 1)/2, unrolled weight by weight."""
    cfg = model_config()
    model = build_model(cfg, seed=1).double()
    config = ema(views=["image"], momentum=0.9, momentum_schedule=schedule)
    teacher = build_teachers({"ema": config}, cfg, model)["ema"]
    expected = {name: value.clone() for name, value in model.towers["image"].named_parameters()}
    generator = torch.Generator().manual_seed(3)
    for k in range(6):
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        teacher.follow_(model, k, 6)
        m = 0.9 if schedule == "constant" else 1 - 0.1 * (math.cos(math.pi * k / 6) + 1) / 2
        for name, value in model.towers["image"].named_parameters():
            expected[name] = m * expected[name] + (1 - m) * value.detach()
    for name, value in teacher.model.towers["image"].named_parameters():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-13)


def test_a_teacher_has_only_the_towers_it_needs_no_gradient_and_no_dropout() -> None:
    cfg = model_config()
    model = build_model(cfg).train()
    teacher = build_teachers({"ema": ema(views=["strong"])}, cfg, model)["ema"].train()
    assert list(teacher.model.towers) == ["image"]
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in teacher.modules())
    views = teacher({"image": pictures(), "strong": pictures().flip(0), "text": torch.zeros(4, 8, dtype=torch.int64)})
    assert list(views) == teacher.outputs == ["strong_ema"]
    assert not views["strong_ema"].requires_grad
    assert torch.equal(views["strong_ema"], model.eval().encode("image", pictures().flip(0)))
    assert teacher({"strong": pictures()}, skip=["strong_ema"]) == {}


def test_statistics_of_batch_norms_come_along() -> None:
    norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 16))
    cfg = model_config(views={"image": "image"}, towers={"image": TINY_MODEL["towers"]["image"]})
    model = EncoderModel({"image": norm}, {"image": "image"}, 16)
    teacher = build_teachers({"ema": ema(momentum=1.0, momentum_schedule="constant")}, cfg, model)["ema"]
    model.train()({"image": torch.randn(9, 3, 2, 2)})
    mean = "towers.image.1.running_mean"
    teacher.follow_(model, 0, 10)
    assert torch.equal(teacher.model.state_dict()[mean], model.state_dict()[mean])
    assert model.state_dict()[mean].any()


def test_a_frozen_teacher_reads_its_own_size_and_tokens_of_the_same_crop(tmp_path: Path) -> None:
    """A checkpoint with larger pictures and another vocabulary: its inputs are further views with the same draws."""
    own = copy.deepcopy(TINY_MODEL) | {"embed_dim": 24}
    own["towers"]["image"]["config"] |= {"image_size": 32}
    own["towers"]["text"]["config"] |= {"vocab_size": 700}
    big_config = parse_config(ModelConfig, own, "test")
    big = build_model(big_config, seed=5)
    save_model(big, big_config, tmp_path / "big")
    cfg = model_config()
    configs = {"big": FrozenTeacherConfig(kind="frozen", weights=str(tmp_path / "big"))}
    inputs = with_teachers(build_inputs(cfg, train=True), configs, cfg)
    assert list(inputs.views) == ["image", "strong", "text", "image_big", "strong_big", "text_big"]
    assert inputs.image("strong_big").size == 32
    assert inputs.image("strong_big").augmentation == inputs.image("strong").augmentation
    assert inputs.draw_key("strong_big") == inputs.draw_key("strong") != inputs.draw_key("image")
    assert inputs.field_of("text_big") == "text"
    teacher = build_teachers(configs, cfg, build_model(cfg))["big"]
    batch = {
        "image": pictures(),
        "strong": pictures(),
        "image_big": pictures(32),
        "strong_big": pictures(32).flip(0),
        "text": inputs.texts("text", ["a red square"] * 4),
        "text_big": inputs.texts("text_big", ["a red square"] * 4),
    }
    made = teacher(batch)
    assert list(made) == ["image_big", "strong_big", "text_big"]
    big.eval()
    assert torch.equal(made["strong_big"], big.encode("image", pictures(32).flip(0)))
    assert torch.equal(made["text_big"], big.encode("text", inputs.texts("text_big", ["a red square"] * 4)))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.follow_(build_model(cfg, seed=9), 3, 4)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    its_own = with_teachers(build_inputs(big_config, train=True), configs, big_config)
    assert list(its_own.views) == ["image", "text"]  # a teacher that reads what we read adds no inputs


def test_a_frozen_teacher_of_an_open_clip_file_has_our_towers(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    cfg = model_config()
    model = build_model(cfg, seed=7)
    visual = {
        name.replace("towers.image.net.", "visual."): value.clone()
        for name, value in model.state_dict().items()
        if name.startswith("towers.image.net.")
    }
    save_file(visual, tmp_path / "clip.safetensors")
    config = FrozenTeacherConfig(kind="frozen", weights=str(tmp_path / "clip.safetensors"), views=["image"])
    teacher = build_teachers({"t": config}, cfg, build_model(cfg, seed=1))["t"]
    data = build_inputs(cfg, train=False).images("image", [encoded_image(0, 30, 30)])
    assert torch.equal(teacher({"image": data})["image_t"], model.eval().encode("image", data))


def test_an_average_is_a_checkpoint_that_stands_alone(tmp_path: Path) -> None:
    cfg = model_config()
    teacher = build_teachers({"ema": ema(views=["strong", "image"])}, cfg, build_model(cfg))["ema"]
    save_model(teacher.model, teacher.model_config, tmp_path)
    loaded, inputs, _ = load_checkpoint_model(tmp_path)
    assert set(inputs.views) == {"image", "strong"}
    assert torch.equal(
        loaded.encode("image", pictures()), teacher({"image": pictures(), "strong": pictures()})["image_ema"]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"teachers": {"ema": {"kind": "emma"}}},
            "'teachers.ema' has the value {'kind': 'emma'}, but: a teacher",
        ),
        ({"teachers": {"ema": {"kind": "ema", "weights": "x"}}}, "unknown field 'teachers.ema.weights'"),
        ({"teachers": {"ema": {"kind": "ema", "momentum": 1.5}}}, "momentum' has the value 1.5"),
        ({"teachers": {"big": {"kind": "frozen"}}}, "weights' is required"),
        ({"teachers": {"ema": {"kind": "ema", "views": ["imag"]}}}, "teachers.ema.views names 'imag', but the views"),
        ({"teachers": {"e-a": {"kind": "ema"}}}, "letters, digits and underscores, not 'e-a'"),
        ({"objective": {"name": "infonce", "views": ["image", "image_ema"]}}, "objective.views names 'image_ema'"),
        (
            {"objective": {"name": "sum", "terms": {"a": {"objective": {"name": "siglip", "views": ["image", "x"]}}}}},
            "objective.terms.a.objective.views names 'x', but the views are image, text",
        ),
        (
            {
                "model": TINY_MODEL | {"views": TINY_MODEL["views"] | {"image_ema": {"tower": "image", "of": "image"}}},
                "teachers": {"ema": {"kind": "ema"}},
            },
            "teachers.ema adds the view 'image_ema', which there is already",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, tiny_run("corpus", Path("out")) | change, "test")
    assert words in str(caught.value)


def test_a_teacher_that_is_not_there_or_lacks_a_view_is_refused(tmp_path: Path) -> None:
    cfg = model_config()
    inputs = build_inputs(cfg, train=True)
    gone = FrozenTeacherConfig(kind="frozen", weights=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"teachers.big: weights .*gone do not exist"):
        with_teachers(inputs, {"big": gone}, cfg)
    part = model_config().of_views(["image"])
    save_model(build_model(part), part, tmp_path / "part")
    config = FrozenTeacherConfig(kind="frozen", weights=str(tmp_path / "part"))
    with pytest.raises(ConfigError, match="reads neither the view 'text' nor the field 'text'; it reads image"):
        with_teachers(inputs, {"big": config}, cfg)


def test_the_resolved_config_shows_teachers_views_and_labels() -> None:
    fields = tiny_run("corpus", Path("out"), teachers={"ema": {"kind": "ema"}}, labels={"source": "source"})
    cfg = parse_config(TrainConfig, fields, "test")
    text = dump_config(cfg)
    for shown in ("momentum: 0.996", "momentum_schedule: cosine", "column: source", "kind: auto", "copies: 1"):
        assert shown in text
    assert parse_config(TrainConfig, cfg.model_dump(mode="json"), "again") == cfg
