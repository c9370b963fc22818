"""`clew verify` finds every defect that is planted and none besides; `clew inspect` shows what the files hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cl import cli, storage
from cl.batches.loader import Loader
from cl.batches.plan import BatchPlan
from cl.config import parse_config
from cl.corpus import LANE_FIELD, Corpus, content_hash, open_corpus
from cl.encoders import build_inputs
from cl.errors import ConfigError, DataError
from cl.run import write_run_info
from cl.training.config import TrainConfig
from pipelines.inspect import inspect_batch, inspect_samples
from pipelines.verify import verify
from tests.curation_corpora import run_plan
from tests.training_corpus import tiny_run, write_corpus
from tests.unit.corpora import image_corpus, text_corpus
from tests.unit.test_curation_plan import Sample, picture
from tests.unit.test_curation_plan import image_corpus as raw_corpus


def change(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    """Rewrite a fragment, its row groups as they were."""
    rows = pq.ParquetFile(path).metadata.row_group(0).num_rows
    pq.write_table(edit(pq.read_table(path)), path, row_group_size=rows)


def put(column: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def edit(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[row] = value
        at = table.schema.get_field_index(column)
        return table.set_column(at, table.schema.field(column), pa.array(values, table.schema.field(column).type))

    return edit


def manifest(root: Path, **fields: Any) -> None:
    corpus = storage.read_json(str(root / "corpus.json"))
    (root / "corpus.json").write_text(json.dumps(corpus | fields))


FIRST = "samples/00000.parquet"


def truncate(root: Path) -> None:
    shard = root / "shards" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])


def spoil(root: Path) -> None:
    row = pq.read_table(root / FIRST).to_pylist()[3]
    data = bytearray((root / row["shard"]).read_bytes())
    data[row["offset"] + row["length"] // 2] ^= 255
    (root / row["shard"]).write_bytes(data)


DEFECTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: (root / FIRST).unlink(), "does not exist"),
    (lambda root: (root / FIRST).write_bytes(b"PAR1 nothing"), "is not a readable parquet file"),
    (lambda root: manifest(root, samples=99), "says 99 samples, but its fragments have 24"),
    (lambda root: manifest(root, quarantined=2), "says 2 quarantined, but the quarantine has 0 rows"),
    (lambda root: change(root / FIRST, lambda table: table.slice(1)), "has 11 rows, but corpus.json says 12"),
    (lambda root: change(root / FIRST, lambda table: table.slice(1)), "row groups of"),
    (lambda root: change(root / FIRST, lambda table: table.drop_columns(["text"])), "has no column 'text'"),
    (lambda root: change(root / FIRST, put("key", 2, "other")), "its id is not that of source 'test', key 'other'"),
    (lambda root: change(root / FIRST, put("id", 2, "xyz")), "does not have 32 hex digits"),
    (lambda root: change(root / FIRST, put("offset", 2, -4)), "offset -4 and length"),
    (lambda root: change(root / FIRST, put("offset", 2, 600)), "its bytes at 600 are not those that were ingested"),
    (lambda root: change(root / FIRST, put("length", 2, 10**6)), "its shard ends before byte"),
    (lambda root: change(root / FIRST, put("shard", 2, "gone.tar")), "points to shard gone.tar, which does not exist"),
    (lambda root: (root / "samples" / "00009.parquet").write_bytes(b""), "is not in corpus.json"),
    (truncate, "its shard ends before byte"),
    (spoil, "are not those that were ingested"),
]


@pytest.mark.parametrize("number", range(len(DEFECTS)))
def test_every_planted_defect_is_one_sentence(tmp_path: Path, number: int) -> None:
    image_corpus(tmp_path / "c", fragments=2, rows=12, row_group=5)
    assert verify(str(tmp_path / "c"), deep=True).defects == []
    damage, sentence = DEFECTS[number]
    damage(tmp_path / "c")
    found = verify(str(tmp_path / "c"))
    assert any(sentence in each.defect for each in found.defects), found.defects
    assert all(each.where and "\n" not in each.defect for each in found.defects)


def test_what_only_the_whole_corpus_shows(tmp_path: Path) -> None:
    corpus = image_corpus(tmp_path / "c", fragments=2, rows=6, row_group=6)
    rows = [pq.read_table(tmp_path / "c" / each.path) for each in corpus.fragments]
    twice = pa.concat_tables([rows[1].slice(0, 5), rows[0].slice(2, 1)])
    pq.write_table(twice, tmp_path / "c" / corpus.fragments[1].path)
    [defect] = verify(str(tmp_path / "c")).defects
    assert defect.defect == f"sample {rows[0]['id'][2]} is in the corpus more than once."
    fragments = []
    for number, each in enumerate(corpus.fragments):
        lane = pa.array([number] * 6, pa.int32())
        table = rows[number].append_column(LANE_FIELD, lane)
        if number:
            same = put("length", 0, rows[0]["length"][4].as_py())(table)
            same = put("shard", 0, rows[0]["shard"][4].as_py())(same)
            same = put("offset", 0, rows[0]["offset"][4].as_py())(same)
            table = put("content", 0, rows[0]["content"][4].as_py())(same)
        pq.write_table(table, tmp_path / "c" / each.path)
        fragments.append(each.model_copy(update={"lanes": [number]}))
    Corpus(kind="image-text", samples=12, lanes=2, fragments=fragments).write(str(tmp_path / "c"))
    [defect] = verify(str(tmp_path / "c")).defects
    assert defect.defect.startswith(f"sample {rows[1]['id'][0]} has the content of another lane's sample")
    manifest(tmp_path / "c", lanes=1)
    assert any("has lane 1, but corpus.json says there are 1" in d.defect for d in verify(str(tmp_path / "c")).defects)


def test_text_pairs_and_undecodable_images(tmp_path: Path) -> None:
    text_corpus(tmp_path / "t", rows=20)
    assert verify(str(tmp_path / "t")).defects == []
    change(tmp_path / "t" / FIRST, put("positive", 3, "another"))
    [defect] = verify(str(tmp_path / "t")).defects
    assert defect.defect.endswith("its content hash is not that of its texts.")
    image_corpus(tmp_path / "c", fragments=1, rows=20, row_group=10, broken=tuple(range(1, 10)))
    assert verify(str(tmp_path / "c")).defects == [], "the bytes are those that were ingested"
    deep = verify(str(tmp_path / "c"), deep=True)
    assert len(deep.defects) == 6
    assert all("its image cannot be decoded" in each.defect for each in deep.defects[:5])
    assert deep.defects[5].defect == "4 more samples have the same defect as the ones before"
    assert deep.decoded == 11


def clew(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = 0
    try:
        cli.main(list(words))
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().out


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = image_corpus(tmp_path / "c", fragments=2, rows=12, row_group=5)
    code, out = clew(capsys, "verify", corpus.root, "--json")
    assert (code, json.loads(out)["defects"]) == (0, [])
    rows = corpus.read().to_pylist()
    code, out = clew(capsys, "inspect", corpus.root, rows[18]["id"][:9], "--save", str(tmp_path / "s"), "--json")
    [view] = json.loads(out)
    assert code == 0
    assert view["columns"] == rows[18]
    assert (view["fragment"], view["row"], view["row_group"]) == ("samples/00001.parquet", 6, 1)
    assert view["image"]["same"]
    assert content_hash(Path(view["image"]["saved"]).read_bytes()) == rows[18]["content"]
    assert clew(capsys, "inspect", corpus.root)[0] == clew(capsys, "inspect", corpus.root, "zz")[0] == 2
    code, out = clew(capsys, "inspect", corpus.root, rows[0]["id"])
    assert code == 0
    assert rows[0]["text"] in " ".join(out.split())
    spoil(tmp_path / "c")
    assert clew(capsys, "verify", corpus.root)[0] == 1


def test_a_dropped_sample_is_found_with_its_reason_and_its_bytes(tmp_path: Path) -> None:
    samples = [Sample(f"k{i}", "a red house" if i else "house", picture(i)) for i in range(4)]
    corpus = raw_corpus(tmp_path / "c", [samples])
    run_plan(corpus, tmp_path / "o", [{"caption": {"min_words": 2}}])
    kept = corpus.model_copy(update={"root": str(tmp_path / "o")})
    kept.write(str(tmp_path / "o"))
    pq.write_table(corpus.read().slice(1), tmp_path / "o" / "00000.parquet")
    (tmp_path / "o" / "samples").mkdir()
    (tmp_path / "o" / "00000.parquet").rename(tmp_path / "o" / FIRST)
    (tmp_path / "o" / "config.yaml").write_text(f"corpus: {tmp_path}/c\n")
    row = corpus.read().to_pylist()[0]
    [view] = inspect_samples(str(tmp_path / "o"), [row["id"]])
    assert view.outcome == "dropped by caption: too_few_words"
    assert view.columns["text_words"] == 1
    assert view.image is not None
    assert view.image.same
    assert view.made_from == [str(tmp_path / "c")]
    with pytest.raises(DataError, match="has no sample whose id starts with ffff0000"):
        inspect_samples(str(tmp_path / "o"), ["ffff0000"])
    with pytest.raises(ConfigError, match="'abc' is no id"):
        inspect_samples(str(tmp_path / "o"), ["abc"])


def test_a_batch_is_the_one_that_the_loader_gives(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c", samples=50)
    cfg = parse_config(TrainConfig, tiny_run(corpus, tmp_path / "run", workers={"count": 2}), "x")
    with write_run_info(str(tmp_path / "run"), "train", cfg):
        pass
    plan = BatchPlan([open_corpus(corpus)], cfg.seed, cfg.batch_size)
    inputs = build_inputs(cfg.model, train=True)
    batches = [next(iter(Loader(plan, rank, 2, inputs, start=(1, 2), steps=1))) for rank in range(2)]
    view = inspect_batch(str(tmp_path / "run"), epoch=1, step=2)
    for rank, batch in enumerate(batches):
        ids = [row.numpy().astype(">i8").tobytes().hex() for row in batch.ids]
        assert [row.id for row in view.samples if row.worker == rank] == ids
    assert all(row.text.startswith(f"number {row.key}: ") for row in view.samples)
    with pytest.raises(ConfigError, match="There is no step 4 of epoch 0: an epoch has steps 0 to 3"):
        inspect_batch(str(tmp_path / "run"), epoch=0, step=4)
    with pytest.raises(DataError, match="holds no training run"):
        inspect_batch(corpus, epoch=0, step=0)
