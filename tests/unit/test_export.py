"""Exports load with the other projects' own functions, and give the same embeddings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from cl.config import parse_config
from cl.encoders import EncoderModel, ModelConfig, build_inputs, build_model, load_checkpoint_model, save_model
from cl.errors import ClewError
from cl.export.run import export
from tests.unit.test_encoders import BERT, TEXT, VISION, clip, pairs_of_text

TEXTS = ["a red cat", "two dogs & me", "Upper  CASE!", "end of it all, with many more words than the tower reads " * 3]


def saved(cfg: ModelConfig, folder: Path) -> EncoderModel:
    model = build_model(cfg, seed=2)
    for parameter in model.parameters():  # biases and norms start at constants
        noise = torch.Generator().manual_seed(parameter.numel())
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
    save_model(model, cfg, folder)
    return model.eval()


def pictures(side: int) -> Tensor:
    return torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vocabulary", [600, 49408])
@pytest.mark.parametrize("projection", [True, False])
def test_open_clip_loads_it(tmp_path: Path, vocabulary: int, projection: bool) -> None:
    vision = {
        "family": "open_clip",
        "part": "vision",
        "config": {**VISION, "patch_dropout": 0.5},
    }
    text = {"family": "open_clip", "part": "text", "config": {**TEXT, "vocab_size": vocabulary}}
    cfg = clip(embed_dim=16 if projection else 32, towers={"image": {**vision, "projection": projection}, "text": text})
    ours = saved(cfg, tmp_path / "ours")
    result = export(str(tmp_path / "ours"), "open_clip", str(tmp_path / "theirs"))
    assert result.load == f'open_clip.create_model_and_transforms("local-dir:{tmp_path / "theirs"}")'
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'theirs'}")
    theirs.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'theirs'}")
    images, normalise = pictures(32), preprocess.transforms[-1]
    with torch.no_grad():
        image = theirs.encode_image(normalise(images / 255), normalize=True)
        words = theirs.encode_text(tokenizer(TEXTS), normalize=True)
        assert torch.allclose(image, ours.encode("image", images), atol=1e-5)
        texts = build_inputs(cfg, train=False).texts("text", TEXTS)
        assert torch.allclose(words, ours.encode("text", texts), atol=1e-5)
    assert theirs.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert theirs.visual.image_mean == pytest.approx(cfg.towers["image"].mean)  # type: ignore[attr-defined]
    # And back.
    if projection:
        again = cfg.model_copy(update={"weights": str(tmp_path / "theirs")})
        model = build_model(again, seed=5).eval()
        assert torch.equal(model.encode("image", images), ours.encode("image", images))


@pytest.mark.parametrize("head", ["linear", "mlp", "none"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_sentence_transformers_loads_it(tmp_path: Path, head: str, pooling: str) -> None:
    from sentence_transformers import SentenceTransformer

    cfg = pairs_of_text(head=head, pooling=pooling)
    cfg = cfg.model_copy(update={"embed_dim": 32}) if head == "none" else cfg
    ours = saved(cfg, tmp_path / "ours")
    export(str(tmp_path / "ours"), "sentence-transformers", str(tmp_path / "theirs"))
    theirs = SentenceTransformer(str(tmp_path / "theirs"), device="cpu")
    assert theirs.max_seq_length == 20
    with torch.no_grad():
        expected = ours.encode("anchor", build_inputs(cfg, train=False).texts("anchor", TEXTS))
    assert torch.allclose(theirs.encode(TEXTS, convert_to_tensor=True), expected, atol=1e-5)
    assert theirs.similarity(expected, expected).diagonal().tolist() == pytest.approx([1] * len(TEXTS))


def test_hugging_face_loads_it_and_clew_reads_it_back(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    cfg = pairs_of_text(head="none").model_copy(update={"embed_dim": 32})
    ours = saved(cfg, tmp_path / "ours")
    result = export(str(tmp_path / "ours"), "huggingface", str(tmp_path / "theirs"))
    assert result.load.endswith("pooling: mean")
    theirs = AutoModel.from_pretrained(tmp_path / "theirs").eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "theirs")(TEXTS[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        states, mask = theirs(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        expected = ours.encode("anchor", build_inputs(cfg, train=False).texts("anchor", TEXTS[:3]))
    assert torch.allclose(mean / mean.norm(dim=1, keepdim=True), expected, atol=1e-5)
    tower = {"family": "huggingface", "name": str(tmp_path / "theirs"), "head": "none", "max_tokens": 20}
    back = parse_config(ModelConfig, {"embed_dim": 32, "towers": {"text": tower}, "views": {"anchor": "text"}}, "test")
    model, inputs = build_model(back).eval(), build_inputs(back, train=False)
    with torch.no_grad():
        assert torch.allclose(model.encode("anchor", inputs.texts("anchor", TEXTS[:3])), expected, atol=1e-5)


def test_a_trained_temperature_goes_along(tmp_path: Path) -> None:
    saved(clip(), tmp_path / "ours")
    objective = {"temperature.log_scale": torch.tensor(3.25), "bias": torch.tensor(-7.5)}
    torch.save({"objective": objective}, tmp_path / "ours" / "trainer.pt")
    export(str(tmp_path / "ours"), "open_clip", str(tmp_path / "theirs"))
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'theirs'}")
    assert (theirs.logit_scale.item(), theirs.logit_bias.item()) == (3.25, -7.5)


MIXED: dict[str, Any] = {
    "image": {"family": "open_clip", "part": "vision", "config": VISION},
    "text": {"family": "huggingface", "config": BERT, "max_tokens": 20},
}


@pytest.mark.parametrize(
    ("cfg", "form", "words"),
    [
        (clip(), "onnxx", "choose from open_clip, huggingface"),
        (clip(towers=MIXED), "open_clip", r"this model has image \(open_clip\), text \(huggingface\)"),
        (clip(), "sentence-transformers", "one text tower of the family huggingface"),
        (pairs_of_text(), "huggingface", "ends in a linear head"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path: Path, cfg: ModelConfig, form: str, words: str) -> None:
    saved(cfg, tmp_path / "ours")
    with pytest.raises(ClewError, match=words):
        export(str(tmp_path / "ours"), form, str(tmp_path / "theirs"))
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_nothing_is_written_over(tmp_path: Path) -> None:
    saved(clip(), tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(ClewError, match="not an empty folder"):
        export(str(tmp_path / "ours"), "open_clip", str(tmp_path / "theirs"))
    with pytest.raises(ClewError, match="does not exist"):
        export(str(tmp_path / "nowhere"), "open_clip", str(tmp_path / "new"))
    assert load_checkpoint_model(tmp_path / "ours")[2] == clip()
