"""Plans: what is refused and with which sentence, and which nodes a change touches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cl.config import dump_config, load_config, parse_config, shipped_configs
from cl.corpus import Kind, open_corpus
from cl.encoders import ModelConfig, build_model, save_model
from cl.errors import ClewError, ConfigError, DataError
from pipelines.curate import CurateConfig, curate
from pipelines.keyed import id_words
from pipelines.plan import build_plan, named, parse_stages
from pipelines.stages.base import Output, Rows, RowStage, reasons
from pipelines.stages.registry import STAGES
from tests.curation_corpora import Sample, column_of, image_corpus, picture, run_plan, text_corpus

MODEL = {
    "embed_dim": 16,
    "towers": {
        "image": {
            "family": "open_clip",
            "part": "vision",
            "config": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
        },
        "text": {
            "family": "open_clip",
            "part": "text",
            "config": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        },
    },
    "views": {"image": "image", "text": "text"},
}


def checkpoint(folder: Path, text: bool = False, seed: int = 0) -> Path:
    """A small untrained model on disk."""
    tree: dict[str, Any] = dict(MODEL)
    if text:
        tree |= {"towers": {"text": MODEL["towers"]["text"]}, "views": {"anchor": "text", "positive": "text"}}  # type: ignore[index]
    cfg = parse_config(ModelConfig, tree, "test")
    save_model(build_model(cfg, seed), cfg, folder)
    return folder


def corpus_of(root: Path, count: int = 12) -> Any:
    half = count // 2
    samples = [Sample(f"k{i}", f"a small red house number {i}", picture(i)) for i in range(count)]
    return image_corpus(root, [samples[:half], samples[half:]])


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        (["captoin"], "No stage is called 'captoin'.*Did you mean 'caption'"),
        ([{"caption": {"min_word": 2}}], "stages.0.caption: unknown field 'min_word'.*Did you mean 'min_words'"),
        ([{"caption": {"min_words": "two"}}], "'min_words' has the value 'two'"),
        ([{"caption": {"languages": ["english"]}}], "language 'english' is not known"),
        ([{"caption": {}, "image_size": {}}], "stages.0 must be one stage such as"),
        ([{"caption": 3}], "stages.0.caption must be a mapping"),
        ("caption", "stages must be a list"),
        (["caption", {"caption": {"min_words": 2}}], "'caption' is listed twice"),
        ([{"balance": {}}], "give either target or fraction"),
        ([{"balance": {"target": 3}}], "'balance' needs column 'cluster', but nothing has written it"),
        (
            ["image_text_score", "embedding"],
            "needs column 'image_embedding'.*stage 'embedding' writes it and must come",
        ),
        ([{"exact_duplicate": {"best": "quality"}}], "needs column 'quality'"),
    ],
)
def test_stages_that_cannot_run_are_refused_before_anything_starts(tmp_path: Path, stages: Any, sentence: str) -> None:
    corpus = corpus_of(tmp_path / "c", 2)
    model = str(checkpoint(tmp_path / "m"))
    with pytest.raises(ConfigError, match=sentence):
        curate(
            parse_config(
                CurateConfig, {"corpus": corpus.root, "out": str(tmp_path / "o"), "model": model, "stages": stages}, "x"
            )
        )
    assert not (tmp_path / "o").exists()


def refused(tmp_path: Path, kind: type[ClewError], sentence: str, **fields: Any) -> None:
    tree = {"corpus": str(tmp_path / "c"), "out": str(tmp_path / "o"), "stages": ["caption"], **fields}
    with pytest.raises(kind, match=sentence):
        curate(parse_config(CurateConfig, tree, "x"))


def test_places_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    corpus_of(tmp_path / "c", 2)
    refused(tmp_path, DataError, "Corpus .*nowhere does not exist", corpus=str(tmp_path / "nowhere"))
    refused(tmp_path, ConfigError, "must lie outside the corpus", out=str(tmp_path / "c" / "inside"))
    refused(tmp_path, ConfigError, "must lie outside", out=str(tmp_path / "c"))
    refused(tmp_path, ConfigError, "must lie outside", out=str(tmp_path))
    refused(tmp_path, ConfigError, "'embedding' needs a model", stages=["embedding"])
    refused(tmp_path, DataError, "Checkpoint .*none does not exist", stages=["embedding"], model=str(tmp_path / "none"))
    refused(tmp_path, ConfigError, "no stage writes 'score'", write={"columns": ["score"]})
    (tmp_path / "file").write_text("")
    refused(tmp_path, ConfigError, "is a file; give a folder", out=str(tmp_path / "file"))
    text_corpus(tmp_path / "t", [[("a", "b")]])
    refused(
        tmp_path,
        ConfigError,
        "'image_size' works on image-text corpora",
        corpus=str(tmp_path / "t"),
        stages=["image_size"],
    )
    refused(tmp_path, ConfigError, "did not write; give another folder", out=str(tmp_path / "t"))
    image_corpus(tmp_path / "empty", [[]])
    refused(tmp_path, DataError, "has no samples", corpus=str(tmp_path / "empty"))


def test_a_corpus_without_a_column_or_with_another_type_is_refused(tmp_path: Path) -> None:
    corpus_of(tmp_path / "c", 4)
    path = tmp_path / "c" / "samples" / "00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["text"]), path)
    refused(tmp_path, DataError, "has no column 'text'")
    width = table.schema.get_field_index("width")
    pq.write_table(table.set_column(width, "width", table["width"].cast(pa.string())), path)
    refused(tmp_path, DataError, "column 'width' is of type string, but must be int32")


ALL = ["caption", "image_size", "near_duplicate", "embedding", {"clusters": {"count": 2}}, {"balance": {"target": 3}}]


def keys(corpus: Any, tmp_path: Path, stages: list[Any], seed: int = 0) -> dict[str, str]:
    model = str(tmp_path / "m")
    return {node.name: node.key for node in build_plan(corpus, parse_stages(stages), "o", seed, model).nodes}


def test_a_change_touches_what_depends_on_it_and_nothing_else(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c")
    checkpoint(tmp_path / "m")
    before = keys(corpus, tmp_path, ALL)

    def changed(stages: list[Any], seed: int = 0) -> set[str]:
        after = keys(corpus, tmp_path, stages, seed)
        return {name for name in after if after[name] != before.get(name)}

    assert changed(ALL) == set()
    assert changed([*ALL[:-1], {"balance": {"target": 4}}]) == {"balance"}
    assert changed([*ALL[:4], {"clusters": {"count": 3}}, ALL[5]]) == {"clusters", "balance"}
    assert changed([*ALL[:2], {"near_duplicate": {"max_distance": 2}}, *ALL[3:]]) == {
        "near_duplicate", "embedding", "clusters", "balance",
    }  # fmt: skip
    assert changed([{"caption": {"min_words": 2}}, *ALL[1:]]) == set(before) - {"locate"}
    assert changed(ALL, seed=1) == {"clusters", "balance"}
    workers = [*ALL[:3], {"embedding": {"workers": 2}}, *ALL[4:]]
    assert changed(workers) == set(), "how many actors work is no part of the result"
    checkpoint(tmp_path / "m", seed=1)
    from pipelines.stages.embedding import checkpoint_digest

    checkpoint_digest.cache_clear()
    assert changed(ALL) == {"embedding", "clusters", "balance"}
    (tmp_path / "c" / "samples" / "00001.parquet").unlink()
    corpus_of(tmp_path / "c", 10)
    assert keys(open_corpus(str(tmp_path / "c")), tmp_path, ALL)["caption"] != before["caption"]


def test_embeddings_and_scores_equal_the_model_itself(tmp_path: Path) -> None:
    import torch

    from cl.encoders import load_checkpoint_model

    corpus = corpus_of(tmp_path / "c")
    folder = checkpoint(tmp_path / "m")
    stages = [{"embedding": {"batch_size": 4}}, {"image_text_score": {"top_fraction": 0.5}}]
    table = run_plan(corpus, tmp_path / "o", stages, model=str(folder))
    plan = build_plan(corpus, parse_stages(stages), str(tmp_path / "o"), 0, str(folder))
    model, inputs, _ = load_checkpoint_model(folder)
    with torch.inference_mode():
        image = model.encode("image", inputs.images("image", [picture(i) for i in range(12)])).numpy()
        text = model.encode("text", inputs.texts("text", table["text"].to_pylist())).numpy()
    found = np.array(column_of(plan, "embedding", "image_embedding"), np.float32)
    np.testing.assert_allclose(found, image, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)
    score = np.array(table["image_text_score"].to_pylist())
    np.testing.assert_allclose(score, (image * text).sum(1), atol=2e-3)
    words = id_words(table["id"].to_pylist())
    best = np.lexsort((words[:, 1], words[:, 0], -score))[:6]
    kept = [row for row, reason in enumerate(table["drop_reason"].to_pylist()) if reason is None]
    assert kept == sorted(best.tolist())


def test_equal_scores_are_cut_by_id_to_exactly_n(tmp_path: Path) -> None:
    samples = [Sample(f"k{i}", "the same caption", picture(0)) for i in range(10)]
    corpus = image_corpus(tmp_path / "c", [samples[:3], samples[3:]])
    folder = checkpoint(tmp_path / "m")
    stages = ["embedding", {"image_text_score": {"top_fraction": 0.3}}]
    table = run_plan(corpus, tmp_path / "o", stages, model=str(folder))
    assert len(set(table["image_text_score"].to_pylist())) == 1
    kept = [row["id"] for row in table.to_pylist() if row["drop_reason"] is None]
    assert sorted(kept) == sorted(table["id"].to_pylist())[:3]


def test_text_pairs_are_embedded_clustered_and_balanced(tmp_path: Path) -> None:
    pairs = [(f"word {i} of the list", f"meaning {i} of that word") for i in range(20)]
    corpus = text_corpus(tmp_path / "c", [pairs[:7], [*pairs[7:], ("WORD 0  of the list", "meaning 0 of that word")]])
    folder = checkpoint(tmp_path / "m", text=True)
    stages = ["exact_duplicate", "embedding", "image_text_score", {"clusters": {"count": 3}}, "semantic_duplicate"]
    table = run_plan(corpus, tmp_path / "o", [*stages, {"balance": {"target": 2}}], model=str(folder))
    assert table["drop_reason"].to_pylist()[-1] == "exact_duplicate"
    assert sum(reason is None for reason in table["drop_reason"].to_pylist()) <= 2
    assert {"pair_score", "cluster", "cluster_distance"} <= set(table.column_names)


def test_too_few_rows_for_the_clusters_is_one_sentence(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "c", 4)
    folder = checkpoint(tmp_path / "m")
    with pytest.raises(DataError, match="is to find 100 clusters, but only 4 rows are left"):
        run_plan(corpus, tmp_path / "o", ["embedding", "clusters"], model=str(folder))


def test_undecodable_images_are_quarantined_and_the_rest_goes_on(tmp_path: Path) -> None:
    samples = [Sample(f"k{i}", "a red house", picture(i)) for i in range(6)]
    samples[1].image = samples[1].image[: len(samples[1].image) // 2]
    corpus = image_corpus(tmp_path / "c", [samples, [Sample("late", "a red house", picture(9))]])
    shard = tmp_path / "c" / "raw" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:700])  # ends inside the image
    table = run_plan(corpus, tmp_path / "o", ["locate", "caption", "near_duplicate"])
    rows = {row["key"]: row for row in table.to_pylist()}
    assert (rows["k1"]["drop_stage"], rows["k1"]["drop_reason"]) == ("perceptual_hash", "undecodable_image")
    assert (rows["late"]["drop_stage"], rows["late"]["drop_reason"]) == ("locate", "truncated_shard")
    assert [key for key, row in rows.items() if row["quarantined"]] == ["k1", "late"]
    entries = [
        row
        for f in ("00000", "00001")
        for row in pq.read_table(tmp_path / "o" / "quarantine" / f"{f}.parquet").to_pylist()
    ]
    assert [(entry["key"], entry["reason"]) for entry in entries] == [
        ("k1", "undecodable_image"),
        ("late", "truncated_shard"),
    ]
    assert all(entry["detail"] for entry in entries)


class Capitals(RowStage):
    """A stage of a user's own."""

    drops: ClassVar[bool] = True
    wrong: str = ""

    def needs(self, kind: Kind) -> list[str]:
        return ["text"]

    def makes(self, kind: Kind) -> list[pa.Field]:
        return [pa.field("lane" if self.wrong == "reserved" else "capitals", pa.int32())]

    def run(self, rows: Rows) -> Output:
        capitals = np.array([sum(c.isupper() for c in text) for text in rows.texts("text")], np.int32)
        if self.wrong == "short":
            return Output({"capitals": capitals[:-1]})
        if self.wrong == "name":
            return Output({"capital": capitals})
        if self.wrong == "type":
            return Output({"capitals": ["many"] * len(rows)})
        return Output({"capitals": capitals}, reasons(len(rows), {"shouted": capitals > 5}))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("short", "returned 5 values of 'capitals' for 6 rows"),
        ("name", r"returned columns \['capital'\], but it promises \['capitals'\]"),
        ("type", "column 'capitals' does not hold int32"),
        ("reserved", "writes column 'lane', a name that Clew itself uses"),
    ],
)
def test_a_stage_that_breaks_its_promise_is_named(tmp_path: Path, wrong: str, sentence: str) -> None:
    corpus = corpus_of(tmp_path / "c")
    with pytest.raises(ClewError, match=sentence):
        run_plan(corpus, tmp_path / "o", [named(Capitals(wrong=wrong), "capitals")])


def test_shipped_configs_name_known_stages_and_every_stage_has_a_summary() -> None:
    for name in shipped_configs("curate"):
        cfg = load_config(CurateConfig, "curate", name, [])
        again = parse_config(CurateConfig, __import__("yaml").safe_load(dump_config(cfg)), "dumped")
        assert again == cfg, "what is written into a run's folder can be run again"
    rows = STAGES.rows()
    assert {"caption", "image_size", "exact_duplicate", "near_duplicate", "balance"} <= {row["name"] for row in rows}
    assert all(row["summary"] for row in rows)


def test_the_readmes_own_stage_works(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "pipelines" / "README.md").read_text()
    code = text.split("### A stage of your own")[1].split("```python\n")[1].split("```")[0]
    space: dict[str, Any] = {"__name__": "readme"}
    exec(code, space)
    samples = [Sample(str(i), text, picture(i)) for i, text in enumerate(["A RED HOUSE", "a red house", "A House"])]
    corpus = image_corpus(tmp_path / "c", [samples])
    stage = named(space["Shout"](max_capitals=0.3), "shout")
    table = run_plan(corpus, tmp_path / "o", [stage])
    assert table["drop_reason"].to_pylist() == ["shouted", None, None]
    assert table["capitals"].to_pylist()[2] == pytest.approx(2 / 7)


def test_the_readme_lists_every_stage_and_every_column() -> None:
    text = (Path(__file__).resolve().parents[2] / "pipelines" / "README.md").read_text()
    table = text.split("## Curate")[1].split("runs/curated/")[0]
    for entry in STAGES.entries():
        assert f"`{entry.name}`" in table or entry.name == "locate"
