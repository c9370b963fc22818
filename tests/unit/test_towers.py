"""Towers of timm, Hugging Face and open_clip give what those libraries give; decoders do not see padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cl.config import parse_config
from cl.encoders import ModelConfig, build_inputs, build_model, load_checkpoint_model, save_model
from cl.encoders.model import check_model
from cl.encoders.pooling import LatentAttention
from cl.encoders.tokenizers import clip_bpe
from cl.engine.normalise import unit
from cl.errors import ConfigError
from cl.training.locks import LockConfig, Locks
from cl.training.optimizer import layers_above
from cl.training.parallel import blocks_of
from tests.unit.test_encoders import TEXTS

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 32}
DECODER: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 598,
    "eos_token_id": 599,
}


def model_of(embed_dim: int = 16, view: str = "image", weights: str | None = None, **tower: Any) -> ModelConfig:
    tree = {"embed_dim": embed_dim, "towers": {"t": tower}, "views": {view: "t"}, "weights": weights}
    return parse_config(ModelConfig, tree, "test")


def decoder(kind: str = "llama", **changes: Any) -> ModelConfig:
    given = {"config": {"model_type": kind, **DECODER}, "max_tokens": 24, **changes}
    return model_of(view="text", family="huggingface", **given)


def pictures(side: int = 32, rows: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=draw)


def normalised(images: Tensor, mean: Any, std: Any) -> Tensor:
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (mean, std))
    return (images / 255 - mean) / std


VISION_TOWERS: dict[str, dict[str, Any]] = {
    "vit": {"family": "huggingface_vision", "config": {"model_type": "vit", **SMALL}, "pooling": "cls"},
    "clip": {"family": "huggingface_vision", "config": {"model_type": "clip_vision_model", **SMALL}},
    "siglip": {"family": "huggingface_vision", "config": {"model_type": "siglip_vision_model", **SMALL}},
    "siglip-mean": {
        "family": "huggingface_vision",
        "config": {"model_type": "siglip_vision_model", **SMALL},
        "pooling": "mean",
    },
    "dinov2": {"family": "huggingface_vision", "config": {"model_type": "dinov2_with_registers", **SMALL}},
    "convnext": {"family": "huggingface_vision", "config": STAGES},
    "timm-vit": {
        "family": "timm",
        "name": "vit_tiny_patch16_224",
        "config": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "reg_tokens": 2},
    },
    "timm-convnext": {
        "family": "timm",
        "name": "convnext_atto",
        "config": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
        "image_size": 32,
        "head": "mlp",
    },
}


@pytest.mark.parametrize("name", VISION_TOWERS)
def test_a_vision_tower_trains_is_saved_and_stands_alone(name: str, tmp_path: Path) -> None:
    cfg = model_of(**VISION_TOWERS[name])
    check_model(cfg)
    model = build_model(cfg, seed=1)
    assert build_inputs(cfg, train=False).image("image").size == 32
    model.encode("image", pictures())[:, 0].sum().backward()
    reached = [p for p in model.parameters() if p.grad is not None and p.grad.any()]
    assert len(reached) > 0.8 * len(list(model.parameters()))  # all but biases of keys and tokens that stand for masks
    tower: Any = model.eval().towers["t"]
    whole = tower(pictures(), whole=True)
    assert torch.equal(unit(whole.embedding), model.encode("image", pictures()))
    assert torch.equal(tower.head(whole.features), whole.embedding)
    if whole.tokens is not None and name != "convnext":
        assert whole.tokens.shape == (3, 16, tower.token_width)  # no class token, no registers
    save_model(model, cfg, tmp_path)
    loaded, _, _ = load_checkpoint_model(tmp_path)
    assert torch.equal(loaded.encode("image", pictures()), model.encode("image", pictures()))


@pytest.mark.parametrize("name", ["vit", "clip", "dinov2", "timm-vit"])
def test_blocks_layers_and_locks_find_their_way_in_a_vision_tower(name: str) -> None:
    model = build_model(model_of(**VISION_TOWERS[name]))
    assert len(blocks_of(model.towers["t"])) == 2
    depths = layers_above([name for name, _ in model.named_parameters()])
    assert sorted(set(depths.values())) == [1, 2, 3]  # two blocks and the embeddings; the head has none above
    Locks({"t": LockConfig(trained_layers=2)}, model)
    opened = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert opened == {name for name, _ in model.named_parameters() if depths.get(name, 0) < 2}


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "dinov2"])
def test_small_crops_are_read_with_resized_positions(name: str) -> None:
    cfg = model_of(**VISION_TOWERS[name])
    model = build_model(cfg).eval()
    assert model.encode("image", pictures(16)).isfinite().all()


def test_a_clip_folder_of_hugging_face_gives_its_own_embeddings(tmp_path: Path) -> None:
    """Both towers of one folder, its projections as heads, its constants for the pixels."""
    import transformers

    torch.manual_seed(0)
    text = {**DECODER, "max_position_embeddings": 24}
    del text["num_key_value_heads"]
    config = transformers.CLIPConfig(vision_config=SMALL, text_config=text, projection_dim=16)
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    constants = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(constants))
    clip_bpe(600, 24).rust.save(str(tmp_path / "tokenizer.json"))
    towers = {
        "image": {"family": "huggingface_vision", "name": str(tmp_path)},
        "text": {"family": "huggingface", "name": str(tmp_path), "pooling": "last", "max_tokens": 24},
    }
    tree = {"embed_dim": 16, "towers": towers, "views": {"image": "image", "text": "text"}}
    cfg = parse_config(ModelConfig, tree, "test")
    model, inputs = build_model(cfg).eval(), build_inputs(cfg, train=False)
    with torch.no_grad():
        tokens = inputs.texts("text", TEXTS)
        assert isinstance(tokens, dict)
        both = theirs(pixel_values=normalised(pictures(), *constants.values()), **tokens)
        assert torch.allclose(model.encode("image", pictures()), both.image_embeds, atol=1e-5)
        assert torch.allclose(model.encode("text", tokens), both.text_embeds, atol=1e-5)


@pytest.mark.parametrize("name", ["timm-vit", "timm-convnext"])
def test_a_timm_file_gives_timms_own_features(name: str, tmp_path: Path) -> None:
    import timm

    fields = VISION_TOWERS[name]
    theirs: Any = timm.create_model(fields["name"], num_classes=5, **fields["config"]).eval()
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "timm.safetensors")
    cfg = model_of(**fields)
    model = build_model(cfg.model_copy(update={"weights": str(tmp_path / "timm.safetensors")})).eval()
    pixels = normalised(pictures(), theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"])
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(pixels), pre_logits=True)
        assert torch.allclose(model.towers["t"](pictures(), whole=True).features, expected, atol=1e-5)
    if name == "timm-vit":  # another grid
        changed = model_of(**{**fields, "config": {**fields["config"], "img_size": 48}})
        other = build_model(changed.model_copy(update={"weights": str(tmp_path / "timm.safetensors")}))
        assert other.encode("image", pictures(48)).isfinite().all()


SHRUNK_VIT = {"width": 32, "head_width": 16, "layers": 1, "image_size": 32, "patch_size": 16}
SHRUNK_TEXT = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 600, "context_length": 16, "hf_tokenizer_name": None}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "ViT-B-32": SHRUNK_VIT,
    "coca_ViT-B-32": SHRUNK_VIT,
    "RN50": {"width": 8, "layers": [1, 1, 1, 1], "image_size": 64},
    "convnext_base": {"timm_model_name": "convnext_atto", "image_size": 32},
    "ViT-B-16-SigLIP": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224},
    "MobileCLIP-S1": {"timm_model_name": "fastvit_t8", "image_size": 64},
    "EVA02-B-16": {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 224},
}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_models_of_open_clip_by_name_equal_open_clips(name: str, tmp_path: Path) -> None:
    """Shrunk by `config`, with weights of open_clip's own model of the same shape."""
    named = open_clip.get_model_config(name)
    embed_dim = 192 if "SigLIP" in name else 16  # the trunk's own width: it has no projection
    vision = {**named["vision_cfg"], **OPEN_CLIP[name]}
    text = {**named["text_cfg"], **SHRUNK_TEXT}
    theirs: Any = open_clip.CustomTextCLIP(embed_dim, vision, text, quick_gelu=bool(named.get("quick_gelu")))
    theirs.eval()
    theirs.text.output_tokens = theirs.visual.output_tokens = False  # CoCa's give their tokens as well
    file = tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, file)
    towers = {
        "image": {"family": "open_clip", "part": "vision", "name": name, "config": OPEN_CLIP[name]},
        "text": {"family": "open_clip", "part": "text", "name": name, "config": SHRUNK_TEXT},
    }
    views = {"image": "image", "text": "text"}
    tree = {"embed_dim": embed_dim, "towers": towers, "views": views, "weights": str(file)}
    cfg = parse_config(ModelConfig, tree, "test")
    check_model(cfg)
    model, inputs = build_model(cfg), build_inputs(cfg, train=False)
    side = inputs.image("image").size
    tokens = inputs.texts("text", TEXTS)
    assert isinstance(tokens, Tensor)
    padded = torch.zeros(4, 16, dtype=torch.int64)
    padded[:, : tokens.shape[1]] = tokens
    model.eval()
    with torch.no_grad():
        pixels = normalised(pictures(side), open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        seen = theirs.encode_image(pixels, normalize=True)
        read = theirs.encode_text(padded, normalize=True)
        assert torch.allclose(model.encode("image", pictures(side)), seen, atol=1e-5)
        assert torch.allclose(model.encode("text", tokens), read, atol=1e-5)
    model.train()
    made = model({"image": pictures(side), "text": tokens[:3]})
    (made["image"] @ made["text"].T).diagonal().sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean", "cls", "latent"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gpt2"])
def test_a_decoders_embedding_does_not_depend_on_padding(kind: str, pooling: str, bidirectional: bool) -> None:
    cfg = decoder(kind, pooling=pooling, bidirectional=bidirectional, latents=8, latent_heads=2)
    model = build_model(cfg).eval().double()
    tokens = build_inputs(cfg, train=False).texts("text", ["red", "two dogs & a longer text of cats"])
    assert isinstance(tokens, dict)
    embedded = model.encode("text", tokens)
    assert torch.allclose(embedded.norm(dim=1), torch.ones(2, dtype=torch.float64))
    row, real = tokens["input_ids"][0], int(tokens["attention_mask"][0].sum())
    for left, right in ((0, 0), (5, 0), (3, 4), (0, 9)):
        ids = torch.cat([row.new_full((left,), 7), row[:real], row.new_full((right,), 7)])[None]
        mask = torch.cat([row.new_zeros(left), row.new_ones(real), row.new_zeros(right)])[None]
        alone = model.encode("text", {"input_ids": ids, "attention_mask": mask})
        assert torch.allclose(alone[0], embedded[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_only_bidirectional_decoders_see_what_follows(kind: str, padded: bool) -> None:
    for bidirectional in (False, True):
        model = build_model(decoder(kind, pooling="cls", bidirectional=bidirectional)).eval()
        ids = torch.arange(20, 28).repeat(2, 1)
        ids[1, 5] = 99
        mask = torch.ones(2, 8, dtype=torch.int64)
        mask[:, 7] = int(not padded)
        first, second = model.encode("text", {"input_ids": ids, "attention_mask": mask})
        assert torch.allclose(first, second, atol=1e-6) is not bidirectional


def test_a_text_without_tokens_has_an_embedding(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    bare = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "cat": 2, "?": 3}, unk_token="?"))
    bare.pre_tokenizer = Whitespace()
    bare.save(str(tmp_path / "tokenizer.json"))
    texts = ["", "cat", "cat " * 40]
    for eos in (None, "</s>"):
        cfg = decoder(pooling="last", tokenizer=str(tmp_path), eos=eos)
        inputs = build_inputs(cfg, train=False)
        tokens = inputs.texts("text", texts)
        assert isinstance(tokens, dict)
        assert tokens["attention_mask"].sum(1).tolist() == ([1, 1, 24] if eos is None else [1, 2, 24])
        ends = tokens["input_ids"][torch.arange(3), tokens["attention_mask"].sum(1) - 1].tolist()
        assert ends == ([0, 2, 2] if eos is None else [1, 1, 1])
        model = build_model(cfg).eval()
        assert model.encode("text", tokens).isfinite().all()
        save_model(model, cfg, tmp_path / f"saved-{eos is None}")
        loaded, again, _ = load_checkpoint_model(tmp_path / f"saved-{eos is None}")
        assert torch.equal(loaded.encode("text", again.texts("text", texts)), model.encode("text", tokens))


def test_latent_attention_is_that_of_its_formula() -> None:
    """softmax(Q K^T / sqrt d) V with Q from the states and K, V from the latents, one head, then the MLP."""
    torch.manual_seed(0)
    layer = LatentAttention(8, 5, 1).double()
    states = torch.randn(2, 3, 8, dtype=torch.float64)
    key, value = layer.key_value(layer.norm_latents(layer.latents)).chunk(2, dim=-1)
    scores = layer.query(layer.norm_states(states)) @ key.T / 8**0.5
    middle = states + layer.out(scores.softmax(-1) @ value)
    assert torch.allclose(layer(states), middle + layer.mlp(layer.norm_mlp(middle)), atol=1e-12)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_sentence_transformers_loads_a_decoder(pooling: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from cl.export.run import export

    cfg = decoder("qwen3", pooling=pooling)
    model = build_model(cfg, seed=3).eval()
    save_model(model, cfg, tmp_path / "ours")
    export(str(tmp_path / "ours"), "sentence-transformers", str(tmp_path / "theirs"))
    theirs = SentenceTransformer(str(tmp_path / "theirs"), device="cpu")
    with torch.no_grad():
        expected = model.encode("text", build_inputs(cfg, train=False).texts("text", TEXTS))
    assert torch.allclose(theirs.encode(TEXTS, convert_to_tensor=True), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"family": "timm", "name": "convnext_attoo"}, "Did you mean 'convnext_atto'"),
        ({"family": "timm", "name": "hf-hub:someone/model"}, "timm has no model"),
        ({"family": "timm", "name": "convnext_atto", "config": {"depth": "x"}}, "timm cannot build"),
        ({"family": "timm", "name": "convnext_atto", "config": {"pretrained": True}}, "pretrained is not for a config"),
        (
            {"family": "open_clip", "part": "vision", "name": "ViT-B-16-SigLIP"},
            "the trunk's width 768 is not embed_dim 16",
        ),
        ({"family": "huggingface_vision"}, "model_type such as vit"),
        ({"family": "huggingface_vision", "config": STAGES, "pooling": "cls"}, "has no class token"),
        ({"family": "huggingface_vision", "config": {"model_type": "vit", **SMALL}, "head": "none"}, "hidden size 32"),
    ],
)
def test_errors_say_what_is_wrong(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_model(model_of(**fields))


def test_what_only_decoders_or_some_tokenizers_have_is_refused() -> None:
    from tests.unit.test_encoders import pairs_of_text

    for cfg, words in (
        (pairs_of_text(bidirectional=True), "bidirectional is for decoders"),
        (decoder(eos="</nothing>"), "has no such token"),
        (decoder(pooling="latent", latent_heads=5), "does not divide"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_model(cfg)
