"""The loader: what a worker gets of a plan, from real shards, whatever the threads do and whatever is broken."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import orjson
import pytest
import torch

from cl import storage
from cl.batches.batch import Batch
from cl.batches.cache import BoundedCache
from cl.batches.loader import Loader
from cl.batches.plan import BatchPlan
from cl.batches.reader import CorpusReader
from cl.config import load_config
from cl.corpus import Corpus, open_corpus
from cl.encoders import Inputs, ModelConfig, build_inputs
from cl.errors import ConfigError, DataError
from cl.views.images import load_image
from tests.unit.corpora import described_corpus, image_corpus, text_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return image_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return build_inputs(load_config(ModelConfig, "models", "tiny-clip"), train=True)


def tensor(batch: Batch, view: str) -> torch.Tensor:
    value = batch.views[view]
    assert isinstance(value, torch.Tensor)
    return value


def same(a: Batch, b: Batch) -> bool:
    tensors = [(a.ids, b.ids), (a.content, b.content), (a.weight, b.weight)]
    tensors += [(tensor(a, name), tensor(b, name)) for name in a.views]
    return (a.epoch, a.step, a.key) == (b.epoch, b.step, b.key) and all(torch.equal(x, y) for x, y in tensors)


def test_texts_that_differ_in_case_and_space_are_the_same_content(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path, pairs=[("A cat", "one"), ("a  CAT", "two"), ("a dog", "Two "), ("a cow", "three")])
    reader = CorpusReader(BatchPlan([corpus], 0, 4, shuffle=False), ["anchor", "positive"])
    anchors, positives = reader.rows(0).content.T
    assert anchors[0] == anchors[1]
    assert positives[1] == positives[2]
    assert len(set(anchors)) == len(set(positives)) == 3


def ids_of(batches: Iterator[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.ids[batch.weight > 0].tolist()]


def test_epoch_holds_every_sample_with_its_own_picture_and_text(corpus: Corpus) -> None:
    cfg = load_config(ModelConfig, "models", "tiny-clip")
    inputs = build_inputs(cfg, train=False)
    plan = BatchPlan([corpus], 0, 32)
    table = {row["id"]: row for row in corpus.read().to_pylist()}
    seen = set()
    captions: dict[str, int] = {}  # text -> its content id
    for batch in Loader(plan, 0, 1, inputs, steps=plan.steps_per_epoch):
        images, texts = tensor(batch, "image"), tensor(batch, "text")
        assert images.dtype == torch.uint8
        assert images.shape == (32, 3, 64, 64)
        for at in batch.weight.nonzero().flatten().tolist():
            identity = batch.ids[at].numpy().astype(">i8").tobytes().hex()
            row = table[identity]
            seen.add(identity)
            columns = dict(zip(inputs.views, batch.content[at].tolist(), strict=True))
            assert columns["image"] == int.from_bytes(bytes.fromhex(row["content"])[:8], signed=True)
            compared = " ".join(row["text"].split()).casefold()
            assert captions.setdefault(compared, columns["text"]) == columns["text"]
            with open(corpus.shard_url(row["shard"]), "rb") as shard:
                shard.seek(row["offset"])
                picture = load_image(shard.read(row["length"]), 64)
            assert np.array_equal(images[at].numpy().transpose(1, 2, 0), picture)
            tokens = inputs.texts("text", [row["text"]])
            assert isinstance(tokens, torch.Tensor)
            width = min(tokens.shape[1], texts.shape[1])
            assert torch.equal(texts[at, :width], tokens[0, :width])
    assert seen == set(table)
    assert len(set(captions.values())) == len(captions)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_workers_share_the_batches_of_one_worker(corpus: Corpus, inputs: Inputs, world: int) -> None:
    plan = BatchPlan([corpus], 1, 30)
    whole = list(Loader(plan, 0, 1, inputs, steps=6))
    parts = [list(Loader(BatchPlan([corpus], 1, 30), rank, world, inputs, steps=6)) for rank in range(world)]
    for step, batch in enumerate(whole):
        mine = [part[step] for part in parts]
        assert torch.equal(torch.cat([each.ids for each in mine]), batch.ids)
        assert torch.equal(torch.cat([each.weight for each in mine]), batch.weight)
        assert torch.equal(torch.cat([tensor(each, "image") for each in mine]), tensor(batch, "image"))
        assert {each.key for each in mine} == {batch.key}


def test_last_step_is_padded_and_every_worker_takes_part(corpus: Corpus, inputs: Inputs) -> None:
    plan = BatchPlan([corpus], 0, 100)
    parts = [list(Loader(plan, rank, 3, inputs, steps=2))[1] for rank in range(3)]
    assert [len(part) for part in parts] == [33, 33, 34]
    assert [int(part.weight.sum()) for part in parts] == [20, 0, 0]
    assert not parts[0].ids[20:].any()
    assert tensor(parts[2], "image").shape == (34, 3, 64, 64)


def test_starts_anywhere_with_the_very_same_batches(corpus: Corpus, inputs: Inputs) -> None:
    """Resume: a loader started at (epoch, step) continues the batches of the uninterrupted one, augmentation too."""
    plan = BatchPlan([corpus], 0, 25)
    whole = list(Loader(plan, 0, 1, inputs, steps=8))
    for at in (1, 4, 5, 7):
        rest = list(Loader(BatchPlan([corpus], 0, 25), 0, 1, inputs, start=plan.at(at), steps=8 - at, workers=3))
        assert len(rest) == 8 - at
        assert all(same(a, b) for a, b in zip(rest, whole[at:], strict=True))


def test_threads_and_prefetch_change_nothing(corpus: Corpus, inputs: Inputs) -> None:
    plan = BatchPlan([corpus], 0, 40)
    first = list(Loader(plan, 0, 1, inputs, steps=6, workers=1, prefetch=0))
    other = list(Loader(plan, 0, 1, inputs, steps=6, workers=4, prefetch=3, cache_mib=1))
    assert all(same(a, b) for a, b in zip(first, other, strict=True))


def test_augmentation_differs_by_epoch_and_seed(corpus: Corpus, inputs: Inputs) -> None:
    def pictures(seed: int, epoch: int) -> dict[tuple[int, ...], torch.Tensor]:
        plan = BatchPlan([corpus], seed, 120)
        batch = next(iter(Loader(plan, 0, 1, inputs, start=(epoch, 0), steps=1)))
        return {tuple(row): image for row, image in zip(batch.ids.tolist(), tensor(batch, "image"), strict=True)}

    base = pictures(0, 0)
    for other in (pictures(0, 1), pictures(1, 0)):
        assert other.keys() == base.keys()
        changed = sum(not torch.equal(base[key], other[key]) for key in base)
        assert changed > 0.6 * len(base)  # a draw that does not fit ten times over falls back to the centre


def test_corrupt_images_keep_their_place_with_weight_zero(tmp_path: Path, inputs: Inputs) -> None:
    sound = image_corpus(tmp_path / "sound")
    broken = image_corpus(tmp_path / "broken", broken=(3, 4, 77))
    log = tmp_path / "run" / "quarantine.jsonl"
    loader = Loader(BatchPlan([broken], 0, 40), 0, 1, inputs, steps=6, quarantine=log)
    pairs = zip(loader, Loader(BatchPlan([sound], 0, 40), 0, 1, inputs, steps=6), strict=True)
    bad = []
    for ours, theirs in pairs:
        assert torch.equal(ours.ids, theirs.ids)  # nobody shifts
        good = ours.weight > 0
        assert torch.equal(tensor(ours, "image")[good], tensor(theirs, "image")[good])
        assert not tensor(ours, "image")[~good].any()
        bad += ours.ids[~good].tolist()
    assert len(bad) == 6  # three samples in two epochs
    rows = [orjson.loads(line) for line in log.read_bytes().splitlines()]
    assert sorted(row["key"] for row in rows) == ["000003", "000004", "000077"]  # each written once
    assert {row["shard"] for row in rows} == {"shards/00000.tar", "shards/00001.tar"}
    assert all(row["stage"] == "decode" and row["detail"] for row in rows)
    assert loader.quarantined == 3


def test_text_pairs(tmp_path: Path) -> None:
    corpus = text_corpus(tmp_path)
    cfg = ModelConfig.model_validate(
        {
            "embed_dim": 8,
            "towers": {
                "text": {
                    "family": "huggingface",
                    "config": {"model_type": "bert", "vocab_size": 1000},
                    "max_tokens": 12,
                }
            },
            "views": {"anchor": "text", "positive": "text"},
        }
    )
    batches = list(Loader(BatchPlan([corpus], 0, 16), 0, 1, build_inputs(cfg, train=True), steps=7))
    assert len(ids_of(iter(batches))) == len(set(ids_of(iter(batches)))) == 100
    view = batches[0].views["positive"]
    assert isinstance(view, dict)
    assert view["input_ids"].shape == view["attention_mask"].shape
    assert view["input_ids"].shape[1] <= 12
    moved = batches[0].to("cpu")
    assert same_dicts(moved.views["anchor"], batches[0].views["anchor"])


def same_dicts(a: object, b: object) -> bool:
    assert isinstance(a, dict)
    assert isinstance(b, dict)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_remote_shards_are_read_by_chunk(corpus: Corpus, inputs: Inputs) -> None:
    """The same batches from an object store (here fsspec's memory one), with one ranged read a chunk."""
    memory = fsspec.filesystem("memory")
    memory.put(corpus.root, "/bucket/corpus", recursive=True)
    remote = open_corpus("memory://bucket/corpus")
    local = list(Loader(BatchPlan([corpus], 0, 40), 0, 1, inputs, steps=3))
    other = list(Loader(BatchPlan([remote], 0, 40), 0, 1, inputs, steps=3))
    assert all(same(a, b) for a, b in zip(local, other, strict=True))
    reader = CorpusReader(BatchPlan([remote], 0, 40), ["image", "text"])
    for row in range(10):
        reader.image(0, row)
    assert len(reader._spans._values) == 1


def test_a_missing_shard_is_one_clear_error(tmp_path: Path, inputs: Inputs) -> None:
    corpus = image_corpus(tmp_path)
    (tmp_path / "shards/00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar does not exist"):
        list(Loader(BatchPlan([corpus], 0, 40), 0, 1, inputs, steps=3))
    shutil.rmtree(tmp_path / "samples")
    with pytest.raises(DataError, match=r"parquet does not exist"):
        list(Loader(BatchPlan([corpus], 0, 40), 0, 1, inputs, steps=3))


def test_a_fragment_that_is_not_the_manifests_is_refused(tmp_path: Path, inputs: Inputs) -> None:
    corpus = image_corpus(tmp_path, fragments=1)
    table = storage.read_table(corpus.fragment_url(corpus.fragments[0]))
    storage.write_table(corpus.fragment_url(corpus.fragments[0]), table, 7)
    with pytest.raises(DataError, match=r"has 7 rows in row group 0, but corpus\.json says 10"):
        next(iter(Loader(BatchPlan([corpus], 0, 40), 0, 1, inputs, steps=1)))


def test_a_model_with_other_views_is_refused(inputs: Inputs) -> None:
    with pytest.raises(
        ConfigError, match=r"reads the view 'image' \(image\).* views anchor \(text\), positive \(text\)"
    ):
        Loader(BatchPlan([described_corpus([(4, 0)])], 0, 2), 0, 1, inputs)


def test_leaving_the_loop_stops_the_threads(corpus: Corpus, inputs: Inputs) -> None:
    before = threading.active_count()
    for batch in Loader(BatchPlan([corpus], 0, 8), 0, 1, inputs):  # endless
        if batch.epoch == 2:
            break
    del batch
    assert threading.active_count() == before


def test_cache_keeps_to_its_bound_and_makes_each_value_once() -> None:
    cache: BoundedCache[int] = BoundedCache(100)
    made: list[int] = []

    def make(value: int) -> tuple[int, int]:
        made.append(value)
        return value, 40

    for value in (1, 2, 1, 3, 1):
        assert cache.get(value, lambda value=value: make(value)) == value  # type: ignore[misc]
        assert cache.bytes <= 100
    assert made == [1, 2, 3]  # 2 was the oldest when 3 came
    cache.get(2, lambda: make(2))
    assert made == [1, 2, 3, 2]
    assert cache.get(9, lambda: (9, 1000)) == 9
    assert cache.bytes <= 100
    with pytest.raises(ZeroDivisionError):
        cache.get(5, lambda: (1 // 0, 1))
    threads = [threading.Thread(target=lambda: cache.get("slow", lambda: make(7))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.count(7) == 1


@pytest.mark.slow
def test_the_shipped_sample_as_ingested(tmp_path: Path, inputs: Inputs, ray_session: None) -> None:
    """Every sample that ingest lets through is decoded, except what only a full decode can find out."""
    from pipelines.ingest import IngestConfig, ingest

    sample = Path(__file__).parents[2] / "pipelines" / "sample"
    ingest(IngestConfig(inputs=[str(sample / "train")], out=str(tmp_path / "corpus")))
    corpus = open_corpus(str(tmp_path / "corpus"))
    plan = BatchPlan([corpus], 0, 256)
    loader = Loader(plan, 0, 1, inputs, steps=plan.steps_per_epoch)
    ids = ids_of(iter(loader))
    assert len(ids) == len(set(ids))
    assert len(ids) + loader.quarantined == corpus.samples
    assert loader.quarantined < 10
