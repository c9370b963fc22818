"""Curation through Ray: the same bytes whatever happens on the way, and one sentence where it cannot go on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from cl.batches.plan import BatchPlan
from cl.batches.reader import CorpusReader
from cl.config import load_config, parse_config
from cl.corpus import content_hash, open_corpus
from cl.errors import ConfigError, DataError
from cl.training.config import TrainConfig
from cl.training.run import train
from pipelines.curate import CurateConfig, CurateResult, curate
from pipelines.embed import EmbedConfig, embed
from pipelines.remove import remove
from pipelines.verify import verify
from tests.curation_corpora import Sample, image_corpus, picture, text_corpus
from tests.curation_runs import STAGES, config, launch, make_place, tree
from tests.end_to_end.clew import PATIENCE
from tests.training_corpus import tiny_run
from tests.unit.test_curation_plan import checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("curate"))


@pytest.fixture(scope="module")
def finished(place: Path, ray_session: None) -> tuple[Path, CurateResult]:
    return place / "out", curate(config(place, "out"))


def test_every_sample_is_accounted_for(finished: tuple[Path, CurateResult]) -> None:
    out, result = finished
    funnel = json.loads((out / "funnel.json").read_text())
    assert funnel["in"] == result.samples_in == 160
    assert funnel["kept"] + funnel["quarantined"] + funnel["dropped"] == 160
    assert result.quarantined == 1
    assert result.dropped["caption/too_few_words"] == 8
    assert result.dropped["image_size/image_too_small"] == 8
    assert result.dropped["exact_duplicate/exact_duplicate"] == 8
    assert result.dropped["near_duplicate/near_duplicate"] == 8
    assert result.dropped["text_duplicate/text_duplicate"] == 8
    alive = 160
    for stage in funnel["stages"]:
        assert stage["in"] == alive
        alive -= sum(stage["dropped"].values()) + stage["quarantined"]
    assert alive == result.kept == round(0.8 * round(0.9 * (160 - 8 * 5 - 1)))
    annotated = [row for path in sorted((out / "annotated").iterdir()) for row in pq.read_table(path).to_pylist()]
    kept = {row["id"] for row in annotated if row["drop_reason"] is None}
    written = open_corpus(str(out)).read().to_pylist()
    assert {row["id"] for row in written} == kept
    assert len(written) == len(kept) == result.kept


def test_shards_hold_the_very_bytes_and_captions_and_webdataset_reads_them(
    finished: tuple[Path, CurateResult], place: Path
) -> None:
    import webdataset

    out, result = finished
    corpus = open_corpus(str(out))
    source = {row["id"]: row for row in open_corpus(str(place / "corpus")).read().to_pylist()}
    assert corpus.lanes == 4
    assert len(corpus.fragments) == result.shards > 2
    urls = [str(out / fragment.shard) for fragment in corpus.fragments]
    read = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    order = []
    for fragment in corpus.fragments:
        table = pq.read_table(out / fragment.path)
        data = (out / fragment.shard).read_bytes()
        with tarfile.open(out / fragment.shard) as tar:
            members = tar.getmembers()
        assert {member.mtime for member in members} == {0}
        assert [member.name.split(".")[0] for member in members[::3]] == table["id"].to_pylist()
        for row in table.to_pylist():
            original = source[row["id"]]
            start = original["offset"]
            image = Path(original["shard"]).read_bytes()[start : start + original["length"]]
            assert data[row["offset"] : row["offset"] + row["length"]] == image == read[row["id"]]["jpg"]
            assert read[row["id"]]["txt"].decode() == row["text"] == original["text"]
            sidecar = json.loads(read[row["id"]]["json"])
            assert (sidecar["key"], sidecar["cluster"]) == (original["key"], row["cluster"])
            assert row["shard"] == fragment.shard
        lanes = np.repeat(fragment.lanes or [], fragment.row_groups)
        assert table["lane"].to_pylist() == lanes.tolist()
        order += lanes.tolist()
    assert order == sorted(order)
    assert len(read) == corpus.samples


def test_a_finished_run_does_no_work_again(finished: tuple[Path, CurateResult], place: Path) -> None:
    out, result = finished
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    start = time.monotonic()
    again = curate(config(place, "out"))
    assert time.monotonic() - start < 3
    assert again == result.model_copy(update={"resumed": True})
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_lost_shard_is_written_again_the_same(finished: tuple[Path, CurateResult], place: Path) -> None:
    out, _ = finished
    before = tree(out)
    (out / "shards" / "00001.tar").unlink()
    (out / "samples" / "00001.parquet").unlink()
    curate(config(place, "out"))
    assert tree(out) == before


@pytest.mark.slow
def test_without_its_nodes_a_run_computes_the_same_again(place: Path, ray_session: None) -> None:
    cfg = config(place, "forgetful", stages=STAGES[:3])
    curate(cfg)
    before = tree(place / "forgetful")
    shutil.rmtree(place / "forgetful" / ".nodes")
    assert not curate(cfg).resumed
    assert tree(place / "forgetful") == before


@pytest.mark.slow
def test_changing_one_stage_computes_only_what_depends_on_it(finished: tuple[Path, CurateResult], place: Path) -> None:
    out, _ = finished
    before = tree(out)
    nodes = {path: path.stat().st_mtime_ns for path in (out / ".nodes").rglob("*.parquet")}
    folders = {path.name for path in (out / ".nodes").iterdir() if path.is_dir()}
    changed = curate(config(place, "out", stages=[*STAGES[:-1], {"balance": {"fraction": 0.5}}]))
    assert changed.kept < len(before) * 100
    new = {path.name for path in (out / ".nodes").iterdir() if path.is_dir()} - folders
    assert len(new) == 2, "balance, and the placement of what is kept"
    assert all(path.stat().st_mtime_ns == at for path, at in nodes.items())
    assert tree(out) != before
    curate(config(place, "out"))
    assert tree(out) == before, "back to the first config: its products again, and nothing of the other"


@pytest.mark.slow
def test_more_actors_and_other_partitions_keep_the_same_samples(
    finished: tuple[Path, CurateResult], place: Path
) -> None:
    out, _ = finished
    stages = [{"embedding": {"batch_size": 8, "workers": 2}} if "embedding" in stage else stage for stage in STAGES]
    curate(config(place, "two", stages=stages, partitions=1))
    assert tree(place / "two") == tree(out)


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume_and_leaves_no_process(place: Path) -> None:
    import psutil

    process = launch(place, "interrupted", cpus=1)
    deadline = time.monotonic() + PATIENCE
    while not list((place / "interrupted" / ".nodes").rglob("*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode not in (0, None)
    assert "the same command resumes it" in errors.decode()
    assert json.loads((place / "interrupted" / "run.json").read_text())["status"] == "interrupted"
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert gone


def test_nothing_kept_is_one_sentence_and_the_annotated_rows_are_there(place: Path, ray_session: None) -> None:
    with pytest.raises(DataError, match=r"No sample of .* was kept: 160 too_few_words|caption/too_few_words"):
        curate(config(place, "none", stages=[{"caption": {"min_words": 50}}]))
    assert len(list((place / "none" / "annotated").iterdir())) == 8
    assert json.loads((place / "none" / "run.json").read_text())["status"] == "failed"
    assert not (place / "none" / "corpus.json").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_sentence(place: Path, ray_session: None) -> None:
    small = place / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(DataError, match="cannot be written: no space is left on the disk"):
            curate(config(place, "small/out", stages=STAGES[:4]))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_an_image_that_changed_since_ingest_is_noticed(tmp_path: Path, ray_session: None) -> None:
    samples = [Sample(f"k{i}", "a red house", picture(i)) for i in range(4)]
    image_corpus(tmp_path / "c", [samples])
    path = tmp_path / "c" / "raw" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    cfg = {"corpus": str(tmp_path / "c"), "out": str(tmp_path / "o"), "stages": ["caption"]}
    with pytest.raises(DataError, match="has changed since it was ingested"):
        curate(parse_config(CurateConfig, cfg, "x"))


def test_a_missing_shard_is_one_sentence(tmp_path: Path, ray_session: None) -> None:
    image_corpus(tmp_path / "c", [[Sample("k", "a red house", picture(0))]])
    (tmp_path / "c" / "raw" / "00000.tar").unlink()
    cfg = {"corpus": str(tmp_path / "c"), "out": str(tmp_path / "o"), "stages": ["caption"]}
    with pytest.raises(DataError, match=r"Shard .*00000.tar does not exist, but the corpus points to it"):
        curate(parse_config(CurateConfig, cfg, "x"))


def test_an_id_that_is_there_twice_is_one_sentence(tmp_path: Path, ray_session: None) -> None:
    samples = [Sample("same", "a red house", picture(0)), Sample("other", "a red house", picture(1))]
    image_corpus(tmp_path / "c", [samples, samples[:1]])
    cfg = {"corpus": str(tmp_path / "c"), "out": str(tmp_path / "o"), "stages": ["caption"]}
    with pytest.raises(DataError, match=r"holds id .* twice"):
        curate(parse_config(CurateConfig, cfg, "x"))


def test_text_pairs_and_curating_the_curated(tmp_path: Path, ray_session: None) -> None:
    pairs = [(f"anchor {i % 25}", f"positive {i % 25}") for i in range(40)]
    text_corpus(tmp_path / "c", [pairs[:15], pairs[15:]])
    cfg: dict[str, Any] = {"corpus": str(tmp_path / "c"), "out": str(tmp_path / "o"), "stages": ["exact_duplicate"]}
    result = curate(parse_config(CurateConfig, cfg, "x"))
    assert (result.kept, result.dropped) == (25, {"exact_duplicate/exact_duplicate": 15})
    first = open_corpus(str(tmp_path / "o"))
    table = first.read()
    assert sorted(table["anchor"].to_pylist()) == sorted({anchor for anchor, _ in pairs})
    assert set(table["shard"].to_pylist()) == {fragment.path for fragment in first.fragments}
    cfg |= {"corpus": str(tmp_path / "o"), "out": str(tmp_path / "oo"), "stages": [{"caption": {"min_words": 1}}]}
    curate(parse_config(CurateConfig, cfg, "x"))
    second = open_corpus(str(tmp_path / "oo")).read()
    assert second["id"].to_pylist() == table["id"].to_pylist(), "the order depends on ids and the seed alone"
    assert "anchor_words" in second.column_names


def test_mined_negatives_become_the_column_of_the_corpus(tmp_path: Path, ray_session: None) -> None:
    pairs = [(f"question {i} of the list", f"answer {i} to that question") for i in range(30)]
    text_corpus(tmp_path / "c", [pairs[:13], pairs[13:]])
    checkpoint(tmp_path / "m", text=True)
    cfg = load_config(
        CurateConfig,
        "curate",
        "mine-negatives",
        [f"corpus={tmp_path}/c", f"model={tmp_path}/m", f"out={tmp_path}/o", "stages.3.mine.relative=null"],
    )
    assert curate(cfg).kept == 30
    rows = open_corpus(str(tmp_path / "o")).read().to_pylist()
    positives = {row["id"]: row["positive"] for row in rows}
    for row in rows:
        assert len(row["negatives"]) == row["mined_count"] == 7
        assert row["negatives"] == [positives[each] for each in row["mined_ids"]]
        assert row["positive"] not in row["negatives"]
        assert row["mined_scores"] == sorted(row["mined_scores"], reverse=True)
    text = {"family": "open_clip", "part": "text"}
    text |= {"config": {"context_length": 16, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1}}  # type: ignore[dict-item]
    model = {"embed_dim": 16, "towers": {"text": text}, "views": {"anchor": "text", "positive": "text"}}
    extra = {"negatives": {"column": "negatives", "view": "positive", "most": 4}}
    objective = {"name": "mined-negatives", "extra": ["negatives"]}
    fields = tiny_run(str(tmp_path / "o"), tmp_path / "run", model=model, extra=extra, objective=objective, steps=3)
    assert train(parse_config(TrainConfig, fields, "x")).steps == 3


def test_what_was_removed_stays_away_and_the_run_stays_finished(tmp_path: Path, ray_session: None) -> None:
    samples = [Sample(f"k{i}", "a red house" if i % 5 else "house", picture(i)) for i in range(20)]
    image_corpus(tmp_path / "c", [samples[:10], samples[10:]])
    tree_of: dict[str, Any] = {"corpus": str(tmp_path / "c"), "out": str(tmp_path / "o"), "write": {"lanes": 4}}
    cfg = parse_config(CurateConfig, tree_of | {"stages": [{"caption": {"min_words": 2}}]}, "x")
    assert curate(cfg).kept == 16
    ids = [row["id"] for row in open_corpus(str(tmp_path / "c")).read().to_pylist()]
    (tmp_path / "ids.txt").write_text("\n".join([ids[1], ids[12], ids[5]]))  # the last was dropped already
    [removed] = remove([str(tmp_path / "o")], str(tmp_path / "ids.txt"))
    assert removed.removed == 2
    assert verify(str(tmp_path / "o"), deep=True).defects == []
    before = tree(tmp_path / "o")
    again = curate(cfg)
    assert (again.resumed, again.kept, again.dropped) == (
        True,
        14,
        {"caption/too_few_words": 4, "remove/removed": 2},
    )
    assert tree(tmp_path / "o") == before
    other = curate(parse_config(CurateConfig, tree_of | {"stages": ["caption"]}, "x"))
    assert (other.kept, other.dropped) == (17, {"remove/removed": 3})
    assert not {row["id"] for row in open_corpus(str(tmp_path / "o")).read().to_pylist()} & {ids[1], ids[12], ids[5]}
    assert verify(str(tmp_path / "o"), deep=True).defects == []


def test_a_view_trains_like_a_copy_and_copies_nothing(tmp_path: Path, ray_session: None) -> None:
    texts = ["house" if i % 4 == 1 else f"a red house number {i}" for i in range(24)]
    samples = [Sample(f"k{i}", text, picture(i)) for i, text in enumerate(texts)]
    alone = [Sample("alone", "house", picture(99))]
    source = image_corpus(tmp_path / "c", [samples[:10], alone, samples[10:]])
    fields: dict[str, Any] = {"corpus": source.root, "stages": [{"caption": {"min_words": 2}}]}
    write = {"view": True, "columns": ["text_words"]}
    view = curate(parse_config(CurateConfig, fields | {"out": str(tmp_path / "v"), "write": write}, "x"))
    assert (view.kept, view.shards) == (18, 2)
    corpus = open_corpus(str(tmp_path / "v"))
    assert verify(corpus.root, deep=True).defects == []
    assert not list((tmp_path / "v").rglob("*.tar"))
    kept = [row for row, text in zip(source.read().to_pylist(), [*texts[:10], "house", *texts[10:]], strict=True)
            if text != "house"]  # fmt: skip
    rows = corpus.read().to_pylist()
    assert [row.pop("text_words") for row in rows] == [5] * 18
    assert rows == kept, "the very rows, in their order"
    loader_plan = BatchPlan([corpus], 0, 6)
    reader = CorpusReader(loader_plan, ["image", "text"])
    images = {row["id"]: picture(int(row["key"][1:])) for row in kept}
    seen = []
    for step in range(loader_plan.steps_per_epoch):
        at = loader_plan.step(0, step)
        for chunk, row in zip(at.chunk.tolist(), at.row.tolist(), strict=True):
            name = reader.rows(chunk).ids[row].astype(">i8").tobytes().hex()
            assert reader.image(chunk, row) == images[name]
            seen.append(name)
    assert sorted(seen) == sorted(images)
    # A view of a shuffled copy keeps its lanes, and a view can be curated again, with the same result as its source.
    copy = curate(parse_config(CurateConfig, fields | {"out": str(tmp_path / "k"), "write": {"lanes": 4}}, "x"))
    again = {"corpus": str(tmp_path / "k"), "out": str(tmp_path / "kv"), "stages": ["image_size"], "write": write}
    assert curate(parse_config(CurateConfig, again | {"write": {"view": True}}, "x")).kept == copy.kept == 18
    assert open_corpus(str(tmp_path / "kv")).lanes == 4
    assert verify(str(tmp_path / "kv"), deep=True).defects == []
    assert open_corpus(str(tmp_path / "kv")).read(["id"]) == open_corpus(str(tmp_path / "k")).read(["id"])


def test_embed_writes_one_row_a_sample_and_resumes(place: Path, ray_session: None) -> None:
    cfg = EmbedConfig(corpus=str(place / "corpus"), checkpoint=str(place / "model"), out=str(place / "embedded"))
    result = embed(cfg)
    assert (result.samples, result.quarantined, result.dimensions, result.reused) == (159, 1, 16, 0)
    files = sorted((place / "embedded").glob("*.parquet"))
    before = [path.read_bytes() for path in files]
    rows = [row for path in files for row in pq.read_table(path).to_pylist()]
    ids = set(open_corpus(str(place / "corpus")).read(["id"])["id"].to_pylist())
    assert len(rows) == 159
    assert {row["id"] for row in rows} < ids
    np.testing.assert_allclose([np.linalg.norm(row["text_embedding"]) for row in rows], 1, atol=1e-3)
    files[3].unlink()
    assert embed(cfg).reused == 7
    assert [path.read_bytes() for path in files] == before
    with pytest.raises(ConfigError, match="holds embeddings of another corpus, checkpoint or setting"):
        embed(cfg.model_copy(update={"batch_size": 3}))


def test_new_shards_are_curated_against_a_finished_run(finished: tuple[Path, CurateResult], place: Path) -> None:
    out, _ = finished
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    old = open_corpus(str(out)).read(["id", "content", "key"]).to_pylist()
    place_of = {row["key"]: int(row["key"].partition("-")[0]) * 20 + int(row["key"].partition("-")[2]) for row in old}
    known = [row for row in old if row["content"] == content_hash(picture(place_of[row["key"]]))][:6]
    same = [Sample(f"same-{n}", f"again {n}", picture(place_of[row["key"]])) for n, row in enumerate(known)]
    near = [Sample(f"near-{n}", f"near {n}", picture(place_of[row["key"]], quality=60)) for n, row in enumerate(known)]
    fresh = [Sample(f"new-{n}", f"new house {n} by street {n}", picture(1000 + n)) for n in range(20)]
    image_corpus(place / "newcomers", [same + fresh[:8], near, fresh[8:]], source="new")
    cfg = config(place, "more", corpus=str(place / "newcomers"), against=str(out))
    result = curate(cfg)
    assert result.dropped["exact_duplicate/exact_duplicate"] == 6
    assert result.dropped["near_duplicate/near_duplicate"] == 6
    rows = pq.read_table(place / "more" / "annotated").to_pylist()
    of = {row["key"]: row["exact_duplicate_of"] or row["near_duplicate_of"] for row in rows}
    for n, row in enumerate(known):
        assert of[f"same-{n}"] == of[f"near-{n}"] == row["id"]
    kept = open_corpus(str(place / "more")).read().to_pylist()
    assert {row["key"] for row in kept} <= {sample.key for sample in fresh}
    assert not verify(str(place / "more")).defects
    # The last row that stayed in the old run is the threshold, the centroids are the old ones.
    judged = pq.read_table(out / "annotated").to_pylist()
    after = (None, "semantic_duplicate", "balance")
    last = min(row["image_text_score"] for row in judged if row["drop_stage"] in after)
    scored = [row for row in rows if row["image_text_score"] is not None]
    assert all((row["drop_reason"] == "score_outside_top") == (row["image_text_score"] < last) for row in scored)
    assert curate(cfg).resumed
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before
    assert yaml.safe_load((place / "more" / "config.yaml").read_text())["against"] == str(out)
    with pytest.raises(ConfigError, match="seed must be 0"):
        curate(cfg.model_copy(update={"seed": 1}))
    with pytest.raises(ConfigError, match="is no folder of a curation"):
        curate(cfg.model_copy(update={"against": str(place / "corpus")}))
