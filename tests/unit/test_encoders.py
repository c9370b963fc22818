"""Encoders: towers of both families, one seed, checkpoints that stand alone, and attention that equals torch's."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cl.config import load_config, parse_config, shipped_configs
from cl.encoders import EncoderModel, ModelConfig, build_inputs, build_model, load_checkpoint_model, save_model
from cl.encoders.attention import SelfAttention, attend
from cl.encoders.model import check_model
from cl.encoders.pooling import pool
from cl.encoders.registry import TOWERS
from cl.encoders.tokenizers import clean_text, clip_bpe
from cl.engine.normalise import unit
from cl.errors import ConfigError, DataError
from tests.unit.corpora import encoded_image

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
TEXT = {"vocab_size": 600, "context_length": 24, "width": 32, "heads": 2, "layers": 2}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 600,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TEXTS = ["a red cat", "two dogs & me", "", "café"]


def clip(**changes: Any) -> ModelConfig:
    towers = {
        "image": {"family": "open_clip", "part": "vision", "config": VISION},
        "text": {"family": "open_clip", "part": "text", "config": TEXT},
    }
    tree = {"embed_dim": 16, "towers": towers, "views": {"image": "image", "text": "text"}}
    return parse_config(ModelConfig, {**tree, **changes}, "test")


def pairs_of_text(**changes: Any) -> ModelConfig:
    tower = {"family": "huggingface", "config": BERT, "max_tokens": 20, **changes}
    tree = {"embed_dim": 16, "towers": {"text": tower}, "views": {"anchor": "text", "positive": "text"}}
    return parse_config(ModelConfig, tree, "test")


def images(rows: int = 4) -> Tensor:
    return torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def embeddings(model: EncoderModel, cfg: ModelConfig) -> dict[str, Tensor]:
    inputs = build_inputs(cfg, train=False)
    views = {view: images() if inputs.modality(view) == "image" else inputs.texts(view, TEXTS) for view in cfg.views}
    return model(views)


@pytest.mark.parametrize("cfg", [clip(), pairs_of_text()], ids=["open_clip", "huggingface"])
def test_embeddings_have_length_one_and_every_parameter_a_gradient(cfg: ModelConfig) -> None:
    model = build_model(cfg)
    made = embeddings(model, cfg)
    weight = torch.randn(16, generator=torch.Generator().manual_seed(1))
    for view in cfg.views:
        assert made[view].shape == (4, 16)
        assert made[view].dtype == torch.float32
        assert torch.allclose(made[view].norm(dim=-1), torch.ones(4))
    torch.stack([(each @ weight).square().sum() for each in made.values()]).sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Keys' biases shift all logits of a row alike: their gradient is 0 by mathematics, and may be exactly that.
    assert [name for name in idle if not name.endswith("key.bias")] == []


def test_unit_is_exact_and_safe_at_zero() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, (x,))
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    out = unit(rows)
    assert out.dtype == torch.float32
    assert torch.allclose(out, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    out.sum().backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()
    assert not rows.grad[1].any()


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_state_alone() -> None:
    torch.manual_seed(5)
    first = build_model(clip(), seed=3).state_dict()
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(99)
    again = build_model(clip(), seed=3).state_dict()
    other = build_model(clip(), seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["towers.image.net.proj"], other["towers.image.net.proj"])
    twins = {name: clip().towers["text"] for name in ("left", "right")}
    pair = build_model(clip(towers=twins, views={"anchor": "left", "positive": "right"}))
    assert not torch.equal(*(pair.get_parameter(f"towers.{name}.net.text_projection") for name in twins))
    # A tower's stream is its own: the text tower alone has the same weights.
    alone = clip(towers={"text": clip().towers["text"]}, views={"text": "text"})
    text = build_model(alone, seed=3).state_dict()
    assert all(torch.equal(text[name], first[name]) for name in text)


def test_views_share_a_tower() -> None:
    cfg = pairs_of_text()
    model = build_model(cfg).eval()
    made = embeddings(model, cfg)
    assert len(model.towers) == 1
    assert torch.equal(made["anchor"], made["positive"])


def test_float64_is_float64_throughout() -> None:
    model = build_model(clip()).double()
    made = embeddings(model, clip())
    assert made["image"].dtype == made["text"].dtype == torch.float64
    assert torch.allclose(made["image"].norm(dim=-1), torch.ones(4, dtype=torch.float64), atol=1e-15)


def test_open_clip_towers_equal_open_clip(tmp_path: Path) -> None:
    """A checkpoint of open_clip's own model: same embeddings, in float64, images normalised by us."""
    theirs = open_clip.model.CLIP(16, VISION, TEXT).eval()
    file = tmp_path / "open_clip_model.safetensors"
    save_file({name: t.contiguous() for name, t in theirs.state_dict().items()}, file)
    for source in (file, tmp_path):
        cfg = clip(weights=str(source))
        model = build_model(cfg).eval().double()
        made = embeddings(model, cfg)
        mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
        pixels = (images().double() - (255 * mean).double()) / (255 * std).double()
        tokens = build_inputs(cfg, train=False).texts("text", TEXTS)
        assert isinstance(tokens, Tensor)
        padded = torch.zeros(4, 24, dtype=torch.int64)
        padded[:, : tokens.shape[1]] = tokens
        assert tokens.shape[1] < 24  # shorter padding than open_clip's: behind the text nothing counts
        theirs = theirs.double()
        assert torch.allclose(made["image"], theirs.encode_image(pixels, normalize=True), atol=1e-12, rtol=0)
        assert torch.allclose(made["text"], theirs.encode_text(padded, normalize=True), atol=1e-12, rtol=0)


def test_open_clip_weights_are_resized_to_another_grid_and_context(tmp_path: Path) -> None:
    theirs = open_clip.model.CLIP(16, VISION, TEXT)
    file = tmp_path / "weights.safetensors"
    save_file({name: t.contiguous() for name, t in theirs.state_dict().items()}, file)
    towers = {
        "image": {"family": "open_clip", "part": "vision", "config": {**VISION, "image_size": 48}},
        "text": {"family": "open_clip", "part": "text", "config": {**TEXT, "context_length": 12}},
    }
    model = build_model(clip(towers=towers, weights=str(file)))
    assert model.get_parameter("towers.image.net.positional_embedding").shape == (37, 32)
    assert model.get_parameter("towers.text.net.positional_embedding").shape == (12, 32)
    assert torch.equal(model.get_parameter("towers.image.net.proj"), theirs.visual.proj)


def test_named_open_clip_models_and_overrides() -> None:
    towers = {
        "image": {"family": "open_clip", "part": "vision", "name": "ViT-B-32", "config": {"layers": 1}},
        "text": {"family": "open_clip", "part": "text", "name": "ViT-B-32-quickgelu", "config": {"layers": 1}},
    }
    cfg = clip(embed_dim=512, towers=towers)
    model = build_model(cfg)
    assert model.get_parameter("towers.image.net.conv1.weight").shape == (768, 3, 32, 32)
    assert any(type(m).__name__ == "QuickGELU" for m in model.towers["text"].modules())
    assert not any(type(m).__name__ == "QuickGELU" for m in model.towers["image"].modules())
    assert build_inputs(cfg, train=False).image("image").size == 224
    assert build_inputs(cfg, train=False).text("text").tokenizer.vocab_size == 49408


def test_attention_equals_multihead_attention() -> None:
    """Same parameters, float64, causal mask and none: outputs and all gradients to 1e-12."""
    torch.manual_seed(0)
    original = nn.MultiheadAttention(24, 3, batch_first=True).double()
    ours = SelfAttention(original)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in original.named_parameters()]
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=True)
    causal = torch.full((7, 7), float("-inf"), dtype=torch.float64).triu(1)
    for mask in (None, causal, causal.expand(6, 7, 7)):
        results = []
        for module in (original, ours):
            out = module(x, x, x, need_weights=False, attn_mask=mask)[0]
            loss = (out * torch.linspace(-1, 1, 24, dtype=torch.float64)).square().sum()
            results.append([out, *torch.autograd.grad(loss, [x, *original.parameters()])])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-12, rtol=0)
    # Of a mask for a longer context its first tokens count.
    longer = torch.full((9, 9), float("-inf"), dtype=torch.float64).triu(1)
    assert torch.allclose(ours(x, x, x, attn_mask=longer)[0], ours(x, x, x, attn_mask=causal)[0], atol=1e-15)


def test_half_precision_attention_on_the_cpu_runs_in_float32() -> None:
    q, k, v = (torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    exact = attend(q.bfloat16().double(), k.bfloat16().double(), v.bfloat16().double(), None)
    for context in (torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), None)
        assert half.dtype == torch.bfloat16
        assert torch.equal(half, exact.float().bfloat16())  # only the result is rounded


@pytest.mark.parametrize("cfg", [clip(), pairs_of_text()], ids=["open_clip", "huggingface"])
def test_autocast_stays_near_float32(cfg: ModelConfig) -> None:
    model = build_model(cfg).eval()
    with torch.no_grad():
        exact = embeddings(model, cfg)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = embeddings(model, cfg)
    for view in exact:
        assert half[view].dtype == torch.float32
        assert (exact[view] * half[view]).sum(-1).min() > 0.999


def test_hugging_face_attention_equals_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = pairs_of_text()
    model = build_model(cfg).eval().double()
    net: Any = model.towers["text"].net
    assert net.config._attn_implementation == "clew"
    ours = embeddings(model, cfg)["anchor"]
    net.set_attn_implementation("eager")
    assert torch.allclose(ours, embeddings(model, cfg)["anchor"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("cfg", [clip(), pairs_of_text(pooling="cls", head="mlp")], ids=["open_clip", "huggingface"])
def test_a_checkpoint_gives_the_same_embeddings(cfg: ModelConfig, tmp_path: Path) -> None:
    model = build_model(cfg, seed=1).eval()
    save_model(model, cfg, tmp_path / "checkpoint")
    loaded, inputs, read = load_checkpoint_model(tmp_path / "checkpoint")
    assert not loaded.training
    assert read.views == cfg.views
    for view, each in embeddings(model, cfg).items():
        given = images() if inputs.modality(view) == "image" else inputs.texts(view, TEXTS)
        assert torch.equal(loaded.encode(view, given), each)
    # As weights of another run, seeds do not matter.
    again = build_model(cfg.model_copy(update={"weights": str(tmp_path / "checkpoint")}), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_run_gives_its_newest_finished_checkpoint(tmp_path: Path) -> None:
    cfg = clip()
    for step, finished in ((100, True), (200, True), (300, False)):
        folder = tmp_path / f"run/checkpoints/step-{step:08d}"
        save_model(build_model(cfg, seed=step), cfg, folder, write_config=False)
        if finished:
            (folder / "manifest.json").write_text("{}")
    save_model(build_model(cfg), cfg, tmp_path / "other")
    (tmp_path / "run/config.yaml").write_bytes((tmp_path / "other/config.yaml").read_bytes())
    loaded, _, _ = load_checkpoint_model(tmp_path / "run")
    newest = build_model(cfg, seed=200)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), newest.parameters(), strict=True))


def test_a_hugging_face_folder_is_read_and_a_checkpoint_of_it_stands_alone(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**{k: v for k, v in BERT.items() if k != "model_type"}))
    theirs.eval().save_pretrained(tmp_path / "bert")
    tokenizer = clip_bpe(600, 32)
    tokenizer.rust.save(str(tmp_path / "bert/tokenizer.json"))
    cfg = pairs_of_text(name=str(tmp_path / "bert"), config={}, head="none").model_copy(update={"embed_dim": 32})
    model = build_model(cfg).eval()
    tokens = build_inputs(cfg, train=False).texts("anchor", ["red cats", "one longer text"])
    assert isinstance(tokens, dict)
    states = theirs(**tokens).last_hidden_state
    expected = torch.stack(
        [row[mask.bool()].mean(0) for row, mask in zip(states, tokens["attention_mask"], strict=True)]
    )
    assert torch.allclose(model.encode("anchor", tokens), expected / expected.norm(dim=-1, keepdim=True), atol=1e-6)
    before = embeddings(model, cfg)["anchor"]
    save_model(model, cfg, tmp_path / "checkpoint")
    (tmp_path / "bert").rename(tmp_path / "gone")
    loaded, inputs, _ = load_checkpoint_model(tmp_path / "checkpoint")
    assert torch.equal(loaded.encode("anchor", inputs.texts("anchor", TEXTS)), before)


def test_pooling() -> None:
    states = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(pool(states, mask, "mean")[0], states[0, :2].mean(0))
    assert torch.equal(pool(states, mask, "cls"), states[:, 0])
    assert torch.equal(pool(states, mask, "last"), torch.stack([states[0, 1], states[1, 3]]))
    assert torch.equal(pool(states, torch.zeros_like(mask), "mean"), torch.zeros(2, 3))


HARD_TEXTS = [
    *TEXTS,
    "“Curly” don’t &amp;amp; <b>bold</b>",
    "It's 12345 o'clock, I'll say!",
    "tab\tand\nline\x0b  end ",
    "日本語 and русский 😀 ",
    "sch\u00c3\u00b6n",
    "x" * 200,
    "word " * 50,
]


def test_tokenizer_equals_open_clips() -> None:
    theirs = open_clip.tokenizer.SimpleTokenizer(context_length=24)(HARD_TEXTS)
    for text, expected, ours in zip(HARD_TEXTS, theirs.tolist(), clip_bpe(49408, 24)(HARD_TEXTS), strict=True):
        assert ours + [0] * (24 - len(ours)) == expected, text


def test_small_vocabularies_keep_the_text() -> None:
    for size in (514, 1000, 8192):
        tokenizer = clip_bpe(size, 400)
        assert tokenizer.vocab_size == size
        for text, ids in zip(HARD_TEXTS, tokenizer(HARD_TEXTS), strict=True):
            assert ids[0] == size - 2
            assert ids[-1] == size - 1 == max(ids)
            written = tokenizer.rust.decode(ids[1:-1]).replace("</w>", "")
            assert written.replace(" ", "") == clean_text(text).replace(" ", "")


def test_inputs_pickle_and_report_bad_images() -> None:
    inputs = pickle.loads(pickle.dumps(build_inputs(clip(), train=True)))
    good = encoded_image(0, 50, 40)
    failures: dict[int, str] = {}
    out = inputs.images("image", [good, good[:200], b"text", good], [1, 2, 3, 1], failures)
    assert out.shape == (4, 3, 32, 32)
    assert torch.equal(out[0], out[3])
    assert sorted(failures) == [1, 2]
    assert not out[1:3].any()
    with pytest.raises(DataError, match="Image 1 of the batch cannot be used"):
        inputs.images("image", [good, b""])


ERRORS = [
    (lambda: clip(towers={"t": {"family": "open_clop", "part": "text"}}, views={"text": "t"}), "open_clip"),
    (lambda: clip(towers={"t": {"part": "text"}}, views={"text": "t"}), "field family"),
    (lambda: clip(views={"image": "image", "text": "txt"}), "names tower 'txt'"),
    (lambda: clip(views={"image": "image"}), "tower 'text' is read by no view"),
    (lambda: check_model(one("vision", config={"widht": 3})), "no field 'widht'"),
    (lambda: check_model(one("vision", name="ViT-B-33")), "ViT-B-32"),
    (lambda: check_model(one("text", config={"vocab_size": 99999})), "vocab_size is 99999"),
    (lambda: check_model(one("text", name="ViT-B-16-SigLIP")), "field `tokenizer`"),
    (lambda: check_model(one("text", name="roberta-ViT-B-32")), "family huggingface"),
    (lambda: check_model(pairs_of_text(head="none")), "hidden size 32 is not embed_dim 16"),
    (lambda: check_model(pairs_of_text(max_tokens=64)), "32 position embeddings"),
    (lambda: check_model(pairs_of_text(config={"model_type": "burt"})), "config is not understood"),
    (lambda: pairs_of_text(config={}), "model_type such as bert"),
    (lambda: build_model(clip(weights="/nowhere/x.safetensors")), "do not exist"),
    (lambda: load_checkpoint_model("/nowhere"), "does not exist"),
]


def one(part: str, **fields: Any) -> ModelConfig:
    view = "image" if part == "vision" else "text"
    return clip(towers={"t": {"family": "open_clip", "part": part, **fields}}, views={view: "t"})


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors_say_what_is_wrong(call: Any, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        call()


def test_weights_that_are_no_safetensors_or_do_not_fit(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "pickle.safetensors")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        build_model(clip(weights=str(tmp_path / "pickle.safetensors")))
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="holds no weights of an open_clip vision tower"):
        build_model(clip(weights=str(tmp_path / "other.safetensors")))
    save_model(build_model(clip()), clip(), tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="does not fit this model"):
        build_model(clip(embed_dim=8, weights=str(tmp_path / "checkpoint")))


@pytest.mark.parametrize("name", sorted(shipped_configs("models")))
def test_shipped_models_build(name: str) -> None:
    check_model(load_config(ModelConfig, "models", name))


def test_towers_are_listed_with_their_papers() -> None:
    assert {row["name"] for row in TOWERS.rows()} >= {"open_clip", "huggingface"}


def test_a_users_tower_comes_in_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the user's own adds a family; nothing of Clew is touched."""
    (tmp_path / "bag_of_words.py").write_text(
        "from typing import Literal\n"
        "from torch import nn\n"
        "from cl.encoders.config import TowerConfig\n"
        "from cl.encoders.inputs import TextInput\n"
        "from cl.encoders.registry import TowerFamily\n"
        "from cl.encoders.tokenizers import clip_bpe\n"
        "class BagConfig(TowerConfig):\n"
        "    family: Literal['bag'] = 'bag'\n"
        "    vocab_size: int = 600\n"
        "class Bag(TowerFamily):\n"
        "    'Sums of word vectors.'\n"
        "    config = BagConfig\n"
        "    @staticmethod\n"
        "    def build(cfg, embed_dim):\n"
        "        return nn.EmbeddingBag(cfg.vocab_size, embed_dim)\n"
        "    @staticmethod\n"
        "    def inputs(cfg, train):\n"
        "        return TextInput(clip_bpe(cfg.vocab_size, 16), masked=False)\n"
    )
    info = tmp_path / "bag-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bag\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[clew.towers]\nbag = bag_of_words:Bag\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(TOWERS, "_entries", dict(TOWERS._entries))
    monkeypatch.setattr(TOWERS, "_loaded", False)
    tree = {"embed_dim": 8, "towers": {"t": {"family": "bag"}}, "views": {"anchor": "t", "positive": "t"}}
    cfg = parse_config(ModelConfig, tree, "test")
    model = build_model(cfg)
    save_model(model, cfg, tmp_path / "checkpoint")
    loaded, inputs, _ = load_checkpoint_model(tmp_path / "checkpoint")
    tokens = inputs.texts("anchor", ["a cat"])
    assert torch.equal(loaded.encode("anchor", tokens), model.encode("anchor", tokens))
    assert "bag" in {row["name"] for row in TOWERS.rows()}
