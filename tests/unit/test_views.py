"""Several views of one field: what the model config says, what the loader makes of it, and who reads it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cl.batches.batch import Batch
from cl.batches.loader import Loader
from cl.batches.plan import BatchPlan
from cl.config import dump_config, parse_config
from cl.corpus import Corpus
from cl.encoders import ModelConfig, build_inputs, build_model
from cl.encoders.model import check_model
from cl.errors import ConfigError
from cl.views.augmentation import AUGMENTATIONS
from cl.views.image_augmentation import ImageAugmentation
from cl.views.images import load_image
from tests.training_corpus import TINY_MODEL
from tests.unit.corpora import encoded_image, image_corpus, text_corpus

VIEWS: dict[str, Any] = {
    "image": "image",
    "strong": {"tower": "image", "of": "image", "augment": "simclr"},
    "crop": {"tower": "image", "of": "image", "augment": "dino-local", "size": 8, "copies": 2},
    "text": "text",
    "again": {"tower": "text", "of": "text"},
    "cut": {"tower": "text", "of": "text", "augment": "span"},
}


def model_config(views: dict[str, Any], **vision: Any) -> ModelConfig:
    fields = copy.deepcopy(TINY_MODEL)
    fields["towers"]["image"]["config"] |= vision
    fields["views"] = views
    used = {view if isinstance(view, str) else view["tower"] for view in views.values()}
    fields["towers"] = {name: tower for name, tower in fields["towers"].items() if name in used}
    return parse_config(ModelConfig, fields, "test")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("corpus")
    return image_corpus(root, broken=(7,), encode=lambda number: encoded_image(number, 48, 40, "PNG"))


def batches(corpus: Corpus, views: dict[str, Any], rank: int = 0, world: int = 1, **options: Any) -> list[Batch]:
    plan = BatchPlan([corpus], 3, 30)
    inputs = build_inputs(model_config(views), train=True)
    return list(Loader(plan, rank, world, inputs, steps=options.pop("steps", 8), **options))


def by_sample(made: list[Batch], view: str) -> dict[tuple[int, ...], torch.Tensor]:
    """(epoch, id) -> what the view shows, without padding tokens."""
    found = {}
    for batch in made:
        value = batch.views[view]
        assert isinstance(value, torch.Tensor)
        for row in batch.weight.nonzero().flatten().tolist():
            shown = value[row]
            found[(batch.epoch, *batch.ids[row].tolist())] = shown[shown > 0] if shown.dim() == 1 else shown
    return found


def same(a: dict[tuple[int, ...], torch.Tensor], b: dict[tuple[int, ...], torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


NAMES = ["image", "strong", "crop_1", "crop_2", "text", "again", "cut"]


def test_what_a_batch_holds(corpus: Corpus) -> None:
    made = batches(corpus, VIEWS)
    assert list(made[0].views) == NAMES
    assert made[0].content.shape == (30, 2)  # one column a field, not a view
    shown = {name: by_sample(made, name) for name in NAMES}
    shapes = [tuple(next(iter(shown[name].values())).shape) for name in NAMES[:4]]
    assert shapes == [(3, 16, 16)] * 2 + [(3, 8, 8)] * 2
    assert len(shown["image"]) == 2 * 119  # two epochs without the broken picture
    assert same(shown["text"], shown["again"])  # the very same words: SimCSE's pair
    for a, b in [("image", "strong"), ("crop_1", "crop_2"), ("text", "cut")]:
        assert sum(torch.equal(shown[a][key], shown[b][key]) for key in shown[a]) < 0.1 * len(shown[a])
    first, second = ({key[1:]: value for key, value in shown["strong"].items() if key[0] == e} for e in (0, 1))
    assert not any(torch.equal(first[key], second[key]) for key in first)  # other draws in another epoch


@pytest.mark.parametrize("options", [{"workers": 4, "prefetch": 3}, {"start": (0, 3)}, {"start": (1, 1)}])
def test_replayed_by_seed_sample_and_epoch(corpus: Corpus, options: dict[str, Any]) -> None:
    """Threads, workers and resumption change no pixel and no word of any view."""
    whole = batches(corpus, VIEWS)
    before = (options.get("start", (0, 0))[0] * 4 + options.get("start", (0, 0))[1]) if "start" in options else 0
    again = batches(corpus, VIEWS, steps=8 - before, **options)
    parts = [batch for rank in range(3) for batch in batches(corpus, VIEWS, rank, 3)]
    for name in NAMES:
        assert same(by_sample(again, name), by_sample(whole[before:], name))
        assert same(by_sample(parts, name), by_sample(whole, name))


def test_a_further_view_changes_no_other(corpus: Corpus) -> None:
    alone = batches(corpus, {"image": "image", "strong": VIEWS["strong"], "text": "text"})
    many = batches(corpus, VIEWS)
    for name in ("image", "strong", "text"):
        assert same(by_sample(alone, name), by_sample(many, name))


def test_a_broken_picture_is_masked_in_all_views_and_counted_once(corpus: Corpus) -> None:
    plan = BatchPlan([corpus], 3, 30)
    loader = Loader(plan, 0, 1, build_inputs(model_config(VIEWS), train=True), steps=4)
    bad = [(batch, row) for batch in loader for row in (batch.ids.any(1) & (batch.weight == 0)).nonzero().flatten()]
    assert len(bad) == loader.quarantined == 1
    batch, row = bad[0]
    assert not any(batch.views[name][row].any() for name in NAMES[:4])


def test_text_pairs_take_views_of_either_side(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    views = {"anchor": "text", "cut": {"tower": "text", "of": "anchor", "augment": "delete-words"}}
    made = batches(corpus, views, steps=2)
    assert list(made[0].views) == ["anchor", "cut"]
    assert made[0].content.shape == (30, 1)
    assert not same(by_sample(made, "anchor"), by_sample(made, "cut"))


def test_evaluation_sees_fields_without_augmentation() -> None:
    """`copies` leaves no view of the field's own name; outside of training the field is one all the same."""
    cfg = model_config({"image": {"tower": "image", "augment": "simclr", "copies": 2, "size": 8}})
    assert list(build_inputs(cfg, train=True).views) == ["image_1", "image_2"]
    inputs = build_inputs(cfg, train=False)
    assert inputs.image("image").size == 16
    assert all(inputs.image(view).augmentation is None for view in inputs.views)
    data = encoded_image(0, 40, 40, "PNG")
    pixels = inputs.images("image", [data])
    assert np.array_equal(pixels[0].numpy().transpose(1, 2, 0), load_image(data, 16))
    assert build_model(cfg).eval().encode("image", pixels).shape == (1, 16)


def test_a_views_augmentation_comes_before_the_towers() -> None:
    cfg = model_config({"image": "image", "plain": {"tower": "image", "of": "image", "augment": "none"}})
    inputs = build_inputs(cfg, train=True)
    assert inputs.image("image").augmentation == ImageAugmentation()
    assert inputs.image("plain").augmentation == AUGMENTATIONS["none"]


def test_small_crops_read_resized_position_embeddings() -> None:
    """A large tower on small pictures equals a small tower whose positions are the large grid's bicubic image."""
    large = build_model(model_config({"image": "image"}, image_size=32, patch_size=4)).double()
    small = build_model(model_config({"image": "image"}, image_size=16, patch_size=4)).double()
    state = large.state_dict()
    key = "towers.image.net.positional_embedding"
    grid = state[key][1:].reshape(8, 8, -1).permute(2, 0, 1)
    resized = torch.nn.functional.interpolate(grid[None], size=(4, 4), mode="bicubic")[0].permute(1, 2, 0)
    state[key] = torch.cat([state[key][:1], resized.reshape(16, -1)])
    small.load_state_dict(state)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = large.encode("image", pixels)
    assert torch.allclose(made, small.encode("image", pixels), atol=1e-12)
    made[:, 0].sum().backward()
    slope = dict(large.named_parameters())[key].grad
    assert slope is not None
    assert (slope.abs().sum(1) > 0).sum() > 16  # more than the 16 patches of the small grid


def test_old_configs_say_the_same() -> None:
    cfg = model_config({"image": "image", "text": "text"})
    assert cfg.readers == {"image": "image", "text": "text"}
    assert list(cfg.each_view) == ["image", "text"]
    tree = dump_config(cfg)
    assert "augment: null" in tree
    assert parse_config(ModelConfig, cfg.model_dump(mode="json"), "again") == cfg


RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64, "patch_size": None}


@pytest.mark.parametrize(
    ("views", "vision", "words"),
    [
        (
            {"image": {"tower": "image", "augment": "span"}},
            {},
            "augmentation 'span', which is for text",
        ),
        ({"text": {"tower": "text", "augment": "simclr"}}, {}, "which is for image, but its tower 'text' reads text"),
        ({"text": {"tower": "text", "size": 8}}, {}, "The view 'text' has a size, but its tower 'text' reads text"),
        (
            {"image": {"tower": "image", "size": 32}},
            RESNET,
            "view 'image', whose pictures are 32 pixels",
        ),
        ({"image": {"tower": "image", "copies": 0}}, {}, "'views.image.copies' has the value 0"),
        ({"image": {"tower": "image", "of": "image", "augmented": 1}}, {}, "Did you mean 'augment'?"),
        ({"a": {"tower": "image", "copies": 2}, "a_1": "image"}, {}, "two views have the same name"),
    ],
)
def test_views_that_do_not_fit_are_refused(views: dict[str, Any], vision: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_model(model_config(views, **vision))
    assert words in str(caught.value)


def test_a_field_that_the_corpus_lacks_is_refused(corpus: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"view 'other' of 'picture' \(image\), but .* views image \(image\), text"):
        batches(corpus, {"image": "image", "other": {"tower": "image", "of": "picture"}})
