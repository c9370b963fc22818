"""`evaluate` from corpora and a checkpoint on disk to eval.json."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cl import storage
from cl.corpus import open_corpus
from cl.encoders import EncoderModel, ModelConfig, build_inputs, build_model, save_model
from cl.errors import ConfigError, DataError
from cl.evaluation.embed import Encoder
from cl.evaluation.run import EvalConfig, evaluate, evaluate_corpus, make_metrics
from tests.end_to_end.small_corpora import Pair, noise, png, write_image_corpus, write_text_corpus

TEXT_TOWER = {
    "family": "open_clip",
    "part": "text",
    "config": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
IMAGE_TOWER = {
    "family": "open_clip",
    "part": "vision",
    "config": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
}
TWO_TOWERS = {
    "embed_dim": 16,
    "towers": {"image": IMAGE_TOWER, "text": TEXT_TOWER},
    "views": {"image": "image", "text": "text"},
}
ONE_TOWER = {"embed_dim": 16, "towers": {"text": TEXT_TOWER}, "views": {"anchor": "text", "positive": "text"}}


def checkpoint(folder: Path, config: dict[str, object]) -> str:
    cfg = ModelConfig.model_validate(config)
    save_model(build_model(cfg, seed=1), cfg, folder)
    return str(folder)


def samples(count: int) -> list[Pair]:
    return [(noise(i), f"picture number {i}", {"category": "abc"[i % 3]}) for i in range(count)]


def test_a_random_model_is_at_chance(tmp_path: Path) -> None:
    """Every share lies within four standard errors of its chance, and the file says what the result says."""
    corpus = write_image_corpus(tmp_path / "corpus", samples(300))
    cfg = EvalConfig(
        checkpoint=checkpoint(tmp_path / "model", TWO_TOWERS),
        corpora={"val": corpus},
        metrics=["retrieval", {"zero_shot": {"label": "category", "k": [1]}}],
        out=str(tmp_path / "eval"),
    )
    result = evaluate(cfg)
    shares = [figure for figure in result.corpora["val"].metrics if figure.stderr is not None]
    assert len(shares) == 7
    for figure in shares:
        assert figure.chance is not None
        assert figure.queries == 300
        error = (figure.chance * (1 - figure.chance) / 300) ** 0.5
        assert abs(figure.value - figure.chance) < 4 * error, figure
    assert result.corpora["val"].figure("retrieval/text_to_image/R@1").chance == pytest.approx(1 / 300)
    median = result.corpora["val"].figure("retrieval/text_to_image/median_rank")
    assert median.chance == 150.5
    assert 100 < median.value < 200

    written = storage.read_json(str(tmp_path / "eval" / "eval.json"))
    assert written == result.model_dump()
    example = written["corpora"]["val"]["examples"][0]
    assert len(set(example["top"])) == 5
    assert storage.read_json(str(tmp_path / "eval" / "run.json"))["status"] == "finished"
    assert evaluate(cfg).model_dump() == written  # deterministic, examples included


def test_equal_texts_in_one_space_score_one(tmp_path: Path) -> None:
    corpus = write_text_corpus(tmp_path / "corpus", [(f"text {i}", f"text {i}") for i in range(50)])
    result = evaluate(
        EvalConfig(
            checkpoint=checkpoint(tmp_path / "model", ONE_TOWER),
            corpora={"same": corpus},
            batch_size=7,
            out=str(tmp_path / "eval"),
        )
    )
    found = {figure.metric: figure for figure in result.corpora["same"].metrics}
    for name in ("MRR", "nDCG@10", "R@1", "R@5", "R@10"):
        assert found[f"text_retrieval/anchor_to_positive/{name}"].value == 1.0
    assert found["alignment/anchor_positive"].value == pytest.approx(0.0, abs=1e-9)
    assert found["alignment/anchor_positive"].chance > 1e-3  # type: ignore[operator]


class Colour(nn.Module):
    """Image tower that knows the palette: one-hot of the nearest colour."""

    def __init__(self, palette: Tensor) -> None:
        super().__init__()
        self.palette = palette

    def forward(self, images: Tensor) -> Tensor:
        mean = images.float().mean(dim=(2, 3))
        return nn.functional.one_hot(torch.cdist(mean, self.palette).argmin(dim=1), len(self.palette)).float()


class Word(nn.Module):
    """Text tower that knows the captions: one-hot of the caption with the same tokens."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, tokens: Tensor) -> Tensor:
        same = (tokens[:, None] == self.tokens[None]).all(dim=2)
        return same.float()


def test_a_perfect_embedding_scores_one(tmp_path: Path) -> None:
    """Duplicated samples, a broken image, an empty caption and a second picture of a class make no difference."""
    rng = np.random.default_rng(0)
    palette = np.stack([rng.permutation(np.arange(0, 250, 5))[:40] for _ in range(3)], axis=1)
    good: list[Pair] = [
        (png(np.full((16, 16, 3), colour, dtype=np.uint8)), f"colour {i}", {"category": f"colour {i}"})
        for i, colour in enumerate(palette)
    ]
    truncated = noise(1)[:100]
    bad: list[Pair] = [(truncated, "colour 3", {}), (truncated, "a truncated picture", {}), (noise(2), " ", {})]
    corpus = open_corpus(write_image_corpus(tmp_path / "corpus", [*good[:20], *bad, *good[10:]]))

    inputs = build_inputs(ModelConfig.model_validate(TWO_TOWERS), train=False)
    tokens = inputs.texts("text", [text for _, text, _ in good])
    assert isinstance(tokens, Tensor)
    towers = {"image": Colour(torch.from_numpy(palette).float()), "text": Word(tokens)}
    model = EncoderModel(towers, {"image": "image", "text": "text"}, len(palette)).train()
    encoder = Encoder(model, inputs, torch.device("cpu"), batch_size=6)
    metrics = make_metrics(
        "image-text", [{"retrieval": {}}, {"zero_shot": {"label": "category", "templates": ["{}"]}}], "test"
    )
    result = evaluate_corpus("colours", corpus, metrics, encoder)

    assert result.samples == 50
    assert result.excluded == {"empty text": 1, "broken image": 2}
    assert model.training  # left as it was
    for direction in ("image_to_text", "text_to_image"):
        figure = result.figure(f"retrieval/{direction}/R@1")
        assert (figure.value, figure.queries, figure.candidates) == (1.0, 40, 40)
        assert result.figure(f"retrieval/{direction}/median_rank").value == 1.0
    assert result.figure("zero_shot/category/top-1").value == 1.0
    assert result.figure("zero_shot/category/mean_per_class").value == 1.0
    assert all(example.rank == 1 and example.top_correct[0] for example in result.examples)


def test_a_limit_chooses_the_same_samples_every_time(tmp_path: Path) -> None:
    corpus = write_image_corpus(tmp_path / "corpus", samples(40))
    cfg = EvalConfig(
        checkpoint=checkpoint(tmp_path / "model", TWO_TOWERS),
        corpora={"some": {"path": corpus, "limit": 12, "metrics": [{"retrieval": {"examples": 99}}]}},
        out=str(tmp_path / "eval"),
    )
    result = evaluate(cfg).corpora["some"]
    smallest = sorted(open_corpus(corpus).read(["id"]).column("id").to_pylist())[:12]
    assert {example.query_id for example in result.examples} == set(smallest)


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    corpus = write_image_corpus(tmp_path / "corpus", samples(4))
    pairs = write_text_corpus(tmp_path / "pairs", [("a", "b"), ("c", "d")])
    broken = write_image_corpus(tmp_path / "broken", [(b"not an image", "a caption", {})])
    model = checkpoint(tmp_path / "model", TWO_TOWERS)

    def config(path: str, checkpoint: str = model, **fields: object) -> EvalConfig:
        return EvalConfig.model_validate(
            {"checkpoint": checkpoint, "corpora": {"x": path}, "out": str(tmp_path / "eval"), **fields}
        )

    with pytest.raises(DataError, match=r"Corpus .*/nowhere does not exist"):
        evaluate(config(str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"Checkpoint .*/nothing does not exist"):
        evaluate(config(corpus, str(tmp_path / "nothing")))
    with pytest.raises(DataError, match="has no view 'anchor'; it has image, text"):
        evaluate(config(pairs))
    with pytest.raises(DataError, match="has no image that can be decoded"):
        evaluate(config(broken))
    with pytest.raises(ConfigError, match="device 'tpu9'"):
        evaluate(config(corpus, device="tpu9"))
    (tmp_path / "corpus" / "shards" / "00000.bin").unlink()
    with pytest.raises(DataError, match=r"Shard .*00000.bin of corpus .* does not exist"):
        evaluate(config(corpus))
    assert storage.read_json(str(tmp_path / "eval" / "run.json"))["status"] == "failed"
