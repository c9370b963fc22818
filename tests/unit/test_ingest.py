"""Images by their bytes, samples by their members, rows by their columns, inputs by their names."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cl.errors import ConfigError, DataError
from pipelines.images import ImageInfo, Unusable, probe
from pipelines.ingest import IngestConfig, ingest
from pipelines.inputs import find_shards
from pipelines.readers import REASONS, ImageSample, Record, Rejected, TextSample
from pipelines.readers.blocks import BlockReader
from pipelines.readers.tar import TarReader
from pipelines.readers.text import TextReader
from pipelines.shards import IngestTask, ingest_shard


def picture(kind: str = "JPEG", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB").save(out, kind, **options)
    return out.getvalue()


def tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as opened:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            opened.addfile(header, io.BytesIO(data))
    return path


def read(path: Path, block_bytes: int = 4096, **columns: str) -> list[Record]:
    with BlockReader(str(path), block_bytes) as reader:
        return list(TarReader(columns, 10_000_000).read(reader))


# ------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {})])
def test_every_truncation_of_an_image_is_seen(kind: str, options: dict[str, Any]) -> None:
    data = picture(kind, **options)
    assert probe(data) == ImageInfo(kind.lower(), 40, 30)
    for length in range(1, len(data) - 1, 7):
        assert isinstance(probe(data[:length]), Unusable), length
    assert probe(data[: len(data) // 2]).reason == "truncated_image"  # type: ignore[union-attr]


def test_webp_and_bytes_behind_the_end() -> None:
    data = picture("WEBP")
    assert probe(data) == ImageInfo("webp", 40, 30)
    assert probe(data[:-20]).reason == "truncated_image"  # type: ignore[union-attr]
    assert probe(picture() + b"\0" * 9) == ImageInfo("jpeg", 40, 30)


def test_the_end_marker_of_a_thumbnail_does_not_count() -> None:
    plain = picture()
    thumbnail = b"Exif\0\0" + picture(size=(8, 8))
    data = plain[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + plain[2:]
    assert probe(data) == ImageInfo("jpeg", 40, 30)
    cut = probe(data[:-30])
    assert isinstance(cut, Unusable)
    assert cut.reason == "truncated_image"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"hello", "not_an_image"),
        (b"BM" + bytes(60), "unsupported_image"),
        (b"\0\0\0\x20ftypavif" + bytes(30), "unsupported_image"),
        (picture("PNG")[:20] + b"\xff" + picture("PNG")[21:], "corrupt_image"),
        (b"\xff\xd8\xff\xd9", "corrupt_image"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "truncated_image"),
        (b"RIFF\x0a\0\0\0WEBPVP8 ab", "corrupt_image"),
    ],
)
def test_what_is_no_usable_image(data: bytes, reason: str) -> None:
    found = probe(data)
    assert isinstance(found, Unusable)
    assert found.reason == reason


def test_a_bomb_is_refused_by_its_header() -> None:
    data = bytearray(picture("PNG"))
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    assert probe(bytes(data)).reason == "too_many_pixels"  # type: ignore[union-attr]


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=80), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF0000WEBP"])
)
def test_no_bytes_make_probe_raise(data: bytes, magic: bytes) -> None:
    assert isinstance(probe(magic + data), (ImageInfo, Unusable))


# ------------------------------------------------------------------------------------------------- tars


def test_members_of_a_sample_may_stand_in_any_order(tmp_path: Path) -> None:
    one, two = picture(size=(20, 10)), picture("PNG", size=(10, 20))
    path = tar(tmp_path / "x.tar", [("b.png", two), ("a.txt", b"first"), ("b.txt", b" second\n"), ("a.jpg", one)])
    samples = read(path)
    assert [(s.key, s.text, s.format, s.width) for s in samples if isinstance(s, ImageSample)] == [
        ("b", "second", "png", 10),
        ("a", "first", "jpeg", 20),
    ]
    raw = path.read_bytes()
    assert [raw[s.offset : s.offset + s.length] for s in samples if isinstance(s, ImageSample)] == [two, one]


def test_an_image_larger_than_a_block_is_read_whole(tmp_path: Path) -> None:
    data = picture("PNG", size=(300, 300))
    assert len(data) > 8192
    [sample] = read(tar(tmp_path / "x.tar", [("a.txt", b"t"), ("a.png", data)]), block_bytes=1024)
    assert isinstance(sample, ImageSample)
    assert (sample.width, sample.length) == (300, len(data))


def test_a_repeated_key_keeps_the_first(tmp_path: Path) -> None:
    files = [
        ("a.jpg", picture()),
        ("a.txt", b"one"),
        ("b.txt", b"b"),
        ("b.jpg", picture()),
        ("a.jpg", picture()),
        ("a.txt", b"two"),
    ]
    records = read(tar(tmp_path / "x.tar", files))
    assert [r.reason if isinstance(r, Rejected) else getattr(r, "text", None) for r in records] == [
        "one",
        "b",
        "duplicate_key",
    ]


def test_captions_from_the_metadata(tmp_path: Path) -> None:
    files = [
        ("a.jpg", picture()),
        ("a.json", b'{"caption": "from json", "x": NaN}'),
        ("b.jpg", picture()),
        ("b.json", b'{"caption": 7}'),
        ("c.jpg", picture()),
        ("c.json", b"[1]"),
        ("d.jpg", picture()),
        ("d.json", b'{"caption": "\\ud800"}'),
    ]
    records = read(tar(tmp_path / "x.tar", files), text="txt;json.caption")
    assert isinstance(records[0], ImageSample)
    assert (records[0].text, json.loads(records[0].meta or "")) == ("from json", {"caption": "from json", "x": None})
    assert [r.reason for r in records[1:] if isinstance(r, Rejected)] == ["wrong_type", "invalid_json", "invalid_json"]


def test_unusable_members_are_one_record_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    tar(
        path,
        [
            ("../evil.jpg", picture()),
            ("../evil.txt", b"t"),
            ("ok.jpg", picture()),
            ("ok.txt", b"fine"),
            ("._ok.jpg", b"?"),
        ],
    )
    records = read(path)
    assert [r.key for r in records] == ["../evil", "ok"]
    assert isinstance(records[0], Rejected)
    assert records[0].reason == "unsafe_name"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=20), st.integers(0, 22_000))
def test_a_damaged_shard_never_raises_and_stays_in_the_vocabulary(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], length: int
) -> None:
    image = picture()
    parts = [(f"{i}.{s}", d) for i in range(5) for s, d in (("jpg", image), ("txt", b"text"), ("json", b'{"a": 1}'))]
    path = tmp_path_factory.mktemp("damaged") / "x.tar"
    data = bytearray(tar(path, parts).read_bytes())
    for place, value in changes:
        data[place % len(data)] = value
    path.write_bytes(data[:length])
    for record in read(path):
        assert isinstance(record, ImageSample) or record.reason in REASONS  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------- tables


def table(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def rows(path: Path, **columns: str) -> list[Record]:
    reader = TextReader(columns)
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            reader.check_parquet(file, str(path))
            return list(reader.read_parquet(file))
    with open(path, "rb") as lines:
        return list(reader.read_jsonl(lines))


def test_pairs_with_negatives_key_and_metadata(tmp_path: Path) -> None:
    path = table(
        tmp_path / "x.parquet",
        q=["a", None, "c", "d"],
        anchor_text=pa.array(["b", "b", " ", "d"]).dictionary_encode(),
        negatives=[["n", ""], [], None, ["x"]],
        name=["k", "l", "m", "k"],
        score=[0.5, 1, 2, 3],
        nested=[{"x": 1}] * 4,
    )
    got = rows(path, anchor="q", positive="anchor_text", key="name")
    assert got[0] == TextSample("k", "a", "b", ["n"], '{"score":0.5}')
    assert [r.reason for r in got[1:] if isinstance(r, Rejected)] == ["missing_text", "empty_text", "duplicate_key"]


def test_json_lines_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [
        b'{"anchor": "a", "positive": "b"}',
        b"",
        b"{",
        b'{"anchor": "\xff", "positive": "b"}',
        b'{"anchor": 3, "positive": "b"}',
    ]
    path.write_bytes(b"\n".join([*lines, b'{"anchor": "y", "positive": "z", "negatives": "n"}']))
    got = rows(path)
    assert [r.reason if isinstance(r, Rejected) else r.key for r in got] == [
        "0",
        "invalid_json",
        "invalid_utf8",
        "wrong_type",
        "wrong_type",
    ]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"anchor": ["a"]}, "has no column 'positive'; it has anchor"),
        ({"anchor": [1], "positive": ["a"]}, "column 'anchor' is int64, expected text."),
        (
            {"anchor": ["a"], "positive": ["a"], "negatives": ["n"]},
            "column 'negatives' is string, expected a list of texts.",
        ),
    ],
)
def test_a_wrong_column_is_one_sentence(tmp_path: Path, columns: dict[str, object], sentence: str) -> None:
    with pytest.raises(DataError, match=r"x\.parquet") as error:
        rows(table(tmp_path / "x.parquet", **columns))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- inputs


def test_folders_globs_and_braces_give_the_same_shards(tmp_path: Path) -> None:
    for number in (0, 9, 10):
        tar(tmp_path / f"cats-{number}.tar", [])
    (tmp_path / "notes.txt").write_text("not a shard")
    folder, kind = find_shards([str(tmp_path)], "auto", None)
    assert kind == "image-text"
    assert [(s.source, s.name) for s in folder] == [("cats", "cats-0"), ("cats", "cats-9"), ("cats", "cats-10")]
    assert find_shards([f"{tmp_path}/*.tar"], "auto", None)[0] == folder
    assert find_shards([f"{tmp_path}/cats-{{0,9,10}}.tar"], "auto", None)[0] == folder
    assert find_shards([f"{tmp_path}/cats-{{9..10}}.tar"], "auto", None)[0] == folder[1:]
    assert find_shards([f"file://{tmp_path}/cats-0.tar"], "auto", None)[0] == folder[:1]


def test_a_number_alone_takes_the_folder_as_source(tmp_path: Path) -> None:
    (tmp_path / "laion").mkdir()
    tar(tmp_path / "laion/00003.tar", [])
    assert [(s.source, s.name) for s in find_shards([str(tmp_path / "laion")], "auto", None)[0]] == [("laion", "00003")]
    assert [(s.source, s.name) for s in find_shards([str(tmp_path)], "auto", "s")[0]] == [("s", "laion/00003")]


@pytest.mark.parametrize(
    ("make", "inputs", "sentence"),
    [
        ([], ["nowhere"], "Input {}/nowhere does not exist."),
        ([], ["*.tar"], "matches no .tar or .parquet"),
        ([], [""], "is a folder without any .tar or"),
        (["a.txt"], ["a.txt"], "a.txt is no .tar, .parquet"),
        (["a.tar.gz"], ["a.tar.gz"], "decompress it to a plain .tar first"),
        (["a.tgz"], [""], "decompress it to a plain .tar first"),
        (["a.tar", "b.jsonl"], [""], "ingest them separately"),
        (["x/0.tar", "y/0.tar"], ["x", "y"], None),
        (["x/a.tar", "y/a.tar"], ["x", "y"], "would get the same ids"),
        (["a.tar"], ["a.tar", "a.tar"], "would get the same ids"),
        (["a-0.tar"], ["a-{0..3}.tar"], "a-1.tar does not exist"),
        (["corpus.json"], [""], "is a corpus already"),
    ],
)
def test_inputs_that_cannot_be_used(tmp_path: Path, make: list[str], inputs: list[str], sentence: str | None) -> None:
    for name in make:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    wanted = [f"{tmp_path}/{name}" for name in inputs]
    if sentence is None:
        assert len(find_shards(wanted, "auto", None)[0]) == 2
        return
    with pytest.raises(DataError) as error:
        find_shards(wanted, "auto", None)
    assert sentence.format(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_config_refuses_columns_that_mean_nothing(tmp_path: Path) -> None:
    from cl.config import parse_config

    with pytest.raises(ConfigError, match="columns has 'caption'; accepted are"):
        parse_config(IngestConfig, {"inputs": ["x"], "out": "y", "columns": {"caption": "txt"}}, "test")
    tar(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match=r"columns\.anchor is not used for image-text"):
        ingest(IngestConfig(inputs=[str(tmp_path)], out=str(tmp_path / "out"), columns={"anchor": "q"}))


# ------------------------------------------------------------------------------------------------- fragments


def test_a_fragment_is_done_once_and_bytes_do_not_change(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "s-0.tar", [(f"{i}.{s}", d) for i in range(9) for s, d in (("jpg", picture()), ("txt", b"t"))]
    )
    options = {"kind": "image-text", "columns": {}, "max_pixels": 10**6, "chunk_bytes": 4096, "chunk_rows": 4}
    [shard], _ = find_shards([str(path)], "auto", None)
    task = IngestTask.load(IngestTask(0, shard, options, str(tmp_path / "one")).dump())
    assert task.done() is None
    record = ingest_shard(task)
    assert task.done() == record
    assert sum(record["row_groups"]) == 9
    assert max(record["row_groups"]) <= 4
    first = pq.ParquetFile(tmp_path / "one/samples/00000.parquet")
    assert [first.metadata.row_group(i).num_rows for i in range(first.num_row_groups)] == record["row_groups"]
    other = IngestTask(0, shard, options, str(tmp_path / "two"))
    ingest_shard(other)
    assert (tmp_path / "one/samples/00000.parquet").read_bytes() == (
        tmp_path / "two/samples/00000.parquet"
    ).read_bytes()
    (tmp_path / "one/samples/00000.parquet").unlink()
    assert task.done() is None
    assert IngestTask(0, shard, options | {"max_pixels": 5}, str(tmp_path / "two")).done() is None


def test_a_shard_that_vanishes_is_quarantined(tmp_path: Path) -> None:
    path = tar(tmp_path / "s-0.tar", [("a.jpg", picture()), ("a.txt", b"t")])
    [shard], _ = find_shards([str(path)], "auto", None)
    path.unlink()
    options = {"kind": "image-text", "columns": {}, "max_pixels": 10**6, "chunk_bytes": 4096, "chunk_rows": 4}
    record = ingest_shard(IngestTask(0, shard, options, str(tmp_path / "out")))
    assert record["reasons"] == {"unreadable_shard": 1}


def test_shards_and_corpora_may_be_anywhere_fsspec_reaches(tmp_path: Path) -> None:
    import fsspec

    files = [(f"{i}.{s}", d) for i in range(5) for s, d in (("jpg", picture()), ("txt", b"t"))]
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/s-0.tar", tar(tmp_path / "s-0.tar", files).read_bytes())
    [shard], _ = find_shards(["memory://bucket"], "auto", None)
    assert shard.url == "memory:///bucket/s-0.tar"
    options = {"kind": "image-text", "columns": {}, "max_pixels": 10**6, "chunk_bytes": 4096, "chunk_rows": 4}
    task = IngestTask(0, shard, options, "memory://corpus")
    assert ingest_shard(task)["samples"] == 5
    assert task.done() is not None
    memory.pipe("/bucket/lines.jsonl.gz", gzip.compress(b'{"anchor": "a", "positive": "b"}\n'))
    [lines], kind = find_shards(["memory://bucket/lines.jsonl.gz"], "auto", None)
    assert kind == "text-text"
    assert ingest_shard(IngestTask(1, lines, options | {"kind": kind}, "memory://corpus"))["samples"] == 1
