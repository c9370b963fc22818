"""Planted evaluation samples are found, and what is found is what brute force finds."""

from __future__ import annotations

import io
import json
import re
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cl.errors import ConfigError, DataError
from pipelines.heavy import UndecodableError, decode
from pipelines.plan import build_plan, parse_stages
from pipelines.stages.perceptual_hash import perceptual_hash
from tests.curation_corpora import Sample, image_corpus, picture, run_plan, text_corpus

SAMPLE = Path(__file__).resolve().parents[2] / "pipelines" / "sample"


@lru_cache(maxsize=1)
def drawings() -> tuple[bytes, ...]:
    """600 of the pictures that ship with Clew."""
    images = []
    with tarfile.open(SAMPLE / "train" / "clipart-00000.tar") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith((".jpg", ".png", ".webp")) else None
            data = file.read() if file else b""
            try:
                decode(data)
            except UndecodableError:
                continue
            images.append(data)
            if len(images) == 600:
                break
    return tuple(images)


def grams(text: str, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + size]) for i in range(max(len(words) - size + 1, min(len(words), 1)))}


def test_planted_texts_are_found_and_nothing_else(tmp_path: Path) -> None:
    rows = pq.read_table(SAMPLE / "text" / "train.parquet").slice(0, 1600).to_pylist()
    texts = list(dict.fromkeys(row["positive"] for row in rows if row["positive"]))
    held, train = texts[:300], texts[300:]
    rng = np.random.default_rng(0)
    planted = []
    for number, text in enumerate(held):
        words = text.split()
        changed = [*words[: len(words) // 2], "x", *words[len(words) // 2 + 1 :]]
        planted.append([text.upper(), f"{train[number]}; {text}, they say", " ".join(changed)][number % 3])
    mixed = [*train, *planted]
    order = rng.permutation(len(mixed))
    evaluation = [("", text) for text in held]
    text_corpus(tmp_path / "eval1", [evaluation[:100], evaluation[100:170]])
    text_corpus(tmp_path / "eval2", [evaluation[170:]], source="other")
    pairs = [("", mixed[int(i)]) for i in order]
    corpus = text_corpus(tmp_path / "c", [pairs[:500], pairs[500:]], source="train")
    stage = {
        "against": [str(tmp_path / "eval1"), str(tmp_path / "eval2")],
        "ngram": 3,
        "min_share": 0.7,
        "min_words": 4,
    }
    table = run_plan(corpus, tmp_path / "o", [{"decontaminate_text": stage}]).to_pylist()
    ids: dict[str, str] = {}
    for name in ("eval1", "eval2"):
        for path in sorted((tmp_path / name / "samples").iterdir()):
            ids |= {row["id"]: row["positive"] for row in pq.read_table(path).to_pylist()}
    index = {text: grams(text, 3) for text in held if len(re.findall(r"\w+", text)) >= 4}
    found = 0
    for row in table:
        mine = grams(row["positive"], 3)
        shares = {text: len(theirs & mine) / len(theirs) for text, theirs in index.items()}
        best = max(shares.values())
        assert (row["drop_reason"] == "contaminated") == (best >= 0.7), row["positive"]
        if row["drop_reason"]:
            found += 1
            assert row["decontaminate_text_score"] == pytest.approx(best)
            assert shares[ids[row["decontaminate_text_of"]]] == pytest.approx(best)
    whole = {planted[number] for number, text in enumerate(held) if number % 3 < 2 and text in index}
    caught = {row["positive"] for row in table if row["drop_reason"]} & whole
    assert len(caught) >= 0.99 * len(whole)
    assert len(whole) > 150
    assert found < len(planted) * 1.2, "texts that are merely of the same kind stay"


def copies(image: bytes, kind: int) -> bytes:
    """A picture as it comes back from the web: encoded anew, scaled, in another format."""
    with Image.open(io.BytesIO(image)) as opened:
        flat = Image.fromarray(decode(image)) if opened.mode != "RGB" else opened.convert("RGB")
    buffer = io.BytesIO()
    if kind == 0:
        flat.save(buffer, "jpeg", quality=70)
    elif kind == 1:
        flat.resize((flat.width * 3 // 2, flat.height * 3 // 2), Image.Resampling.LANCZOS).save(buffer, "png")
    else:
        flat.save(buffer, "webp", quality=80)
    return buffer.getvalue()


def test_planted_pictures_are_found_at_99_per_cent(tmp_path: Path) -> None:
    images = drawings()
    held, train = images[:300], images[300:]
    planted = [copies(image, number % 3) for number, image in enumerate(held)]
    broken = Sample("broken", "a", b"\xff\xd8\xff nothing")
    image_corpus(tmp_path / "eval", [[Sample(f"e{i}", "a", image) for i, image in enumerate(held)], [broken]])
    samples = [Sample(f"planted{i}", "a", image) for i, image in enumerate(planted)]
    samples += [Sample(f"own{i}", "a", image) for i, image in enumerate(train)]
    corpus = image_corpus(tmp_path / "c", [samples[::2], samples[1::2]], source="train")
    stage = {"decontaminate_image": {"against": [str(tmp_path / "eval")]}}
    table = run_plan(corpus, tmp_path / "o", [stage]).to_pylist()

    def features(image: bytes) -> tuple[int, np.ndarray]:
        value, thumbnail = perceptual_hash(decode(image))
        return value, np.frombuffer(thumbnail, np.uint8).astype(int)

    index = [features(image) for image in held]
    bytes_of = {sample.key: sample.image for sample in samples}
    for row in table:
        value, pixels = features(bytes_of[row["key"]])
        distances = [(value ^ other).bit_count() for other, their in index if np.abs(pixels - their).max() <= 32]
        best = min(distances, default=64)
        assert (row["drop_reason"] == "contaminated") == (best <= 12)
        assert row["decontaminate_image_score"] == (64 - best if best <= 12 else None)
    caught = sum(row["drop_reason"] == "contaminated" for row in table if row["key"].startswith("planted"))
    wrong = [row["key"] for row in table if row["drop_reason"] and row["key"].startswith("own")]
    twins = 0  # the drawings have duplicates of their own
    for key in wrong:
        value, pixels = features(bytes_of[key])
        twins += any((value ^ other).bit_count() <= 4 and np.abs(pixels - their).max() <= 16 for other, their in index)
    assert caught >= 0.99 * len(planted)
    assert len(wrong) - twins <= 0.01 * len(train)


def with_embeddings(root: Path, points: np.ndarray) -> Any:
    corpus = image_corpus(root, [[Sample(str(i), "a", picture(0, 8, 8)) for i in range(len(points))]])
    path = root / "samples" / "00000.parquet"
    column = pa.FixedSizeListArray.from_arrays(pa.array(points.astype(np.float16).ravel()), points.shape[1])
    pq.write_table(pq.read_table(path).append_column("image_embedding", column), path)
    return corpus


def embedded(folder: Path, points: np.ndarray, key: str = "k") -> str:
    """What `clew embed` writes."""
    folder.mkdir()
    (folder / ".embed.json").write_text(json.dumps({"key": key}))
    column = pa.FixedSizeListArray.from_arrays(pa.array(points.astype(np.float16).ravel()), points.shape[1])
    pq.write_table(
        pa.table({"id": [f"{i:032x}" for i in range(len(points))], "image_embedding": column}), folder / "0.parquet"
    )
    return str(folder)


def test_planted_embeddings_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.stages.decontaminate.COMPARED", 1000)
    rng = np.random.default_rng(0)
    held = rng.normal(size=(150, 16))
    points = np.concatenate([rng.normal(size=(400, 16)), held + rng.normal(0, 0.05, held.shape)])
    held, points = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (held, points))
    corpus = with_embeddings(tmp_path / "c", points)
    against = [embedded(tmp_path / "e1", held[:60]), embedded(tmp_path / "e2", held[60:])]
    stage = {"decontaminate_embedding": {"against": against, "threshold": 0.95}}
    table = run_plan(corpus, tmp_path / "o", [stage]).to_pylist()
    cosine = points.astype(np.float16).astype(np.float32) @ held.astype(np.float16).astype(np.float32).T
    for row, mine in zip(table, cosine, strict=True):
        assert (row["drop_reason"] == "contaminated") == (mine.max() >= 0.95)
        if row["drop_reason"]:
            assert row["decontaminate_embedding_score"] == pytest.approx(mine.max(), abs=1e-5)
            best = int(mine.argmax())
            assert int(row["decontaminate_embedding_of"], 16) == (best if best < 60 else best - 60)
    assert sum(row["drop_reason"] is not None for row in table[400:]) >= 0.99 * 150
    other = {"decontaminate_embedding": {"against": [embedded(tmp_path / "e3", held[:, :8])]}}
    with pytest.raises(DataError, match="have 8 dimensions, those of the corpus 16"):
        run_plan(corpus, tmp_path / "o", [other])


def test_sets_that_cannot_be_used_are_refused_before_anything_starts(tmp_path: Path) -> None:
    corpus = image_corpus(tmp_path / "c", [[Sample("0", "a", picture(0, 8, 8))]])
    text_corpus(tmp_path / "t", [[("a", "b")]])
    cases: list[tuple[str, str, str]] = [
        ("decontaminate_text", "none", "none does not exist"),
        ("decontaminate_image", "t", "is a text-text corpus without pictures"),
    ]
    for name, folder, sentence in cases:
        with pytest.raises((ConfigError, DataError), match=sentence):
            build_plan(corpus, parse_stages([{name: {"against": [str(tmp_path / folder)]}}]), "o", 0)
    with pytest.raises(ConfigError, match="give at least one evaluation corpus"):
        parse_stages([{"decontaminate_text": {"against": []}}])
    stages = parse_stages([{"decontaminate_embedding": {"against": [str(tmp_path / "c")]}}])
    points = with_embeddings(tmp_path / "v", np.eye(2))
    with pytest.raises(ConfigError, match="is no output of `clew embed`"):
        build_plan(points, stages, "o", 0)


def test_another_evaluation_set_is_another_node(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path / "c", [[("a", "b")]])

    def key(name: str, text: str) -> str:
        text_corpus(tmp_path / name, [[(text, "x y z")]])
        stages = parse_stages([{"decontaminate_text": {"against": [str(tmp_path / name)]}}])
        return build_plan(corpus, stages, "o", 0).nodes[0].key

    assert key("1", "one two three") == key("2", "one two three") != key("3", "one two four")
