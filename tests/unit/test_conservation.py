"""Nothing is lost: from shards that are damaged at random every sample that no damage has touched is kept, through
ingest and through curation, and every other one is in the quarantine or dropped with a reason.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cl.corpus import Corpus, Fragment, open_corpus
from pipelines.inputs import find_shards
from pipelines.readers import REASONS
from pipelines.shards import IngestTask, ingest_shard
from tests.curation_corpora import picture, run_plan, text_corpus

BLOCK = 512
fuzzed = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # what continuous integration sees does not change from run to run
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def ingested(shard: Path, out: Path, columns: dict[str, str] | None = None) -> tuple[dict[str, Any], list[dict]]:
    """The record of an ingested shard and the rows of its quarantine."""
    [found], kind = find_shards([str(shard)], "auto", "test")
    options = {"kind": kind, "columns": columns or {}, "max_pixels": 10**6, "chunk_bytes": 4096, "chunk_rows": 4}
    record = ingest_shard(IngestTask(0, found, options, str(out)))
    quarantine = out / "quarantine" / "00000.parquet"
    rejected = pq.read_table(quarantine).to_pylist() if record["quarantined"] else []
    assert record["quarantined"] == len(rejected) == sum(record["reasons"].values())
    assert {row["reason"] for row in rejected} <= set(REASONS)
    if record["samples"]:
        file = pq.ParquetFile(out / "samples" / "00000.parquet")
        groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        assert groups == record["row_groups"]
        fragment = Fragment(
            path="samples/00000.parquet", samples=record["samples"], shard=record["shard"], row_groups=groups
        )
        Corpus(kind=kind, samples=record["samples"], fragments=[fragment]).write(str(out))
    return record, rejected


def kept(out: Path, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was kept, by its key within the shard."""
    rows = pq.read_table(out / "samples" / "00000.parquet").to_pylist() if record["samples"] else []
    assert len({row["id"] for row in rows}) == len(rows) == record["samples"]
    return {row["key"].partition("/")[2]: row for row in rows}


# ------------------------------------------------------------------------------------------------- tars


@lru_cache(maxsize=8)
def image(number: int) -> bytes:
    return picture(number, 24 + number, 20, "png" if number % 3 == 0 else "jpeg")


ODD = ["folder/", "link", "../out.jpg", "noise.bin", "s1.json", "é.txt", ".hidden", "d" * 140 + "/x.jpg"]
odd_members = st.lists(st.tuples(st.integers(0, 20), st.sampled_from(ODD), st.binary(max_size=700)), max_size=4)
flips = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), max_size=6)


def make_tar(path: Path, odd: list[tuple[int, str, bytes]]) -> dict[str, list[tuple[int, int]]]:
    """Write six samples and odd members among them; for each sample the bytes that it stands on."""
    members: list[tuple[str, bytes]] = []
    for number in range(6):
        members += [(f"s{number}.{'png' if number % 3 == 0 else 'jpg'}", image(number)), (f"s{number}.txt", b"a cat")]
    for place, name, data in odd:
        members.insert(place, (name, data))
    where: dict[str, list[tuple[int, int]]] = {}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            start = tar.offset
            header = tarfile.TarInfo(name)
            header.size = len(data)
            if name == "link":
                header.type, header.size, header.linkname = tarfile.SYMTYPE, 0, "s1.jpg"
            elif name.endswith("/"):
                header.type, header.size = tarfile.DIRTYPE, 0
            tar.addfile(header, io.BytesIO(data))
            where.setdefault(name.partition(".")[0], []).append((start, tar.offset))
    return {key: spans for key, spans in where.items() if key.startswith("s") and len(key) == 2}


@fuzzed
@given(odd_members, flips, st.floats(0, 1.3))
@example([], [], 1.0)
@example([(0, "s1.json", b"{")], [], 1.0)
@example([(3, "s1.json", b'{"a": 1}'), (3, "s1.json", b"2")], [], 0.5)
def test_samples_of_a_tar_that_no_damage_touched_are_kept(
    tmp_path_factory: pytest.TempPathFactory,
    odd: list[tuple[int, str, bytes]],
    changes: list[tuple[int, int]],
    length: float,
) -> None:
    root = tmp_path_factory.mktemp("tar")
    path = root / "x.tar"
    spans = make_tar(path, odd)
    data = bytearray(path.read_bytes())
    size = min(int(len(data) * length), len(data))
    hit = {place % len(data) // BLOCK: (place % len(data), bit) for place, bit in changes}  # one flip a block
    for place, bit in hit.values():
        data[place] ^= 1 << bit
    path.write_bytes(data[:size])
    touched = {place // BLOCK for place, _ in hit.values()}
    record, rejected = ingested(path, root / "out")
    found = kept(root / "out", record)
    for key, places in spans.items():
        whole = all(end <= size and not touched & set(range(start // BLOCK, end // BLOCK)) for start, end in places)
        odd_for_it = [member for _, member, _ in odd if member.partition(".")[0] == key]
        if whole and not odd_for_it:
            assert key in found, (key, rejected)
            number = int(key[1:])
            row = found[key]
            assert bytes(data[row["offset"] : row["offset"] + row["length"]]) == image(number)
            assert row["text"] == "a cat"
        elif size == len(data):
            assert key in found or any(row["key"] in (f"x/{key}", None) for row in rejected) or not touched
    if record["samples"]:
        curated(root, len(rejected))


STAGES = ["locate", "caption", "image_size", "exact_duplicate", "near_duplicate"]


def curated(root: Path, quarantined: int) -> None:
    """Curate what was ingested; `run_plan` checks that kept + dropped + quarantined is what went in."""
    corpus = open_corpus(str(root / "out"))
    rows = run_plan(corpus, root / "curated", STAGES).to_pylist()
    assert [row["id"] for row in rows] == corpus.read(["id"])["id"].to_pylist()
    for row in rows:
        if row["drop_reason"] is not None:
            assert row["drop_stage"] is not None
        whole = row["length"] == len(image(int(row["key"][-1])))
        if row["quarantined"]:
            assert row["drop_reason"] in ("undecodable_image", "truncated_shard")
        assert whole or row["quarantined"] or row["drop_reason"] is None or row["drop_stage"]


# ------------------------------------------------------------------------------------------------- tables


texts = st.one_of(st.none(), st.sampled_from(["", "  ", "a", "the same"]), st.text(max_size=30))
table_rows = st.lists(
    st.tuples(
        texts, texts, st.lists(texts, max_size=3) | st.none(), st.sampled_from(["k1", "k2", "k3", None]) | st.text()
    ),
    min_size=1,
    max_size=14,
)


def verdict(row: tuple[Any, ...], seen: set[str]) -> str | None:
    """Why a row is not used, or None; from what the documentation says of each reason."""
    anchor, positive, negatives, key = row
    if key is None:
        return "missing_text"
    for text in (anchor, positive):
        if text is None or not text.strip():
            return "missing_text" if text is None else "empty_text"
    if negatives is not None and None in negatives:
        return "wrong_type"
    if key in seen:
        return "duplicate_key"
    seen.add(key)
    return None


def check_rows(rows: list[tuple[Any, ...]], out: Path, record: dict[str, Any], rejected: list[dict]) -> None:
    seen: set[str] = set()
    expected = [verdict(row, seen) for row in rows]
    good = [row for row, why in zip(rows, expected, strict=True) if why is None]
    found = kept(out, record)
    assert {row[3]: (row[0].strip(), row[1].strip()) for row in good} == {
        key: (row["anchor"], row["positive"]) for key, row in found.items()
    }
    assert [row["reason"] for row in rejected] == [why for why in expected if why is not None]
    assert record["samples"] + record["quarantined"] == len(rows)


@fuzzed
@given(table_rows)
@example([("a", "b", None, "k1"), ("a", "b", ["c", None], "k1"), ("a", "b", ["c"], "k1"), ("x", "y", [], "k1")])
def test_every_row_of_a_table_is_kept_or_in_the_quarantine(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, ...]]
) -> None:
    root = tmp_path_factory.mktemp("table")
    names = ["anchor", "positive", "negatives", "name"]
    kinds = [pa.string(), pa.string(), pa.list_(pa.string()), pa.string()]
    columns = [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    pq.write_table(pa.table(columns, names), root / "x.parquet", row_group_size=3)
    check_rows(rows, root / "one", *ingested(root / "x.parquet", root / "one", {"key": "name"}))
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (root / "y.jsonl").write_text("\n".join(lines) + "\n")
    check_rows(rows, root / "two", *ingested(root / "y.jsonl", root / "two", {"key": "name"}))


LONG = [f"text {number} of a table with some words in it {number * 7919 % 1000}" for number in range(40)]


@lru_cache(maxsize=2)
def table_bytes(compression: str) -> tuple[bytes, list[tuple[int, int]]]:
    """A parquet file of ten row groups of four rows, and the bytes that each group stands on."""
    table = pa.table({"anchor": LONG, "positive": LONG[::-1], "extra": list(range(40))})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=4, compression=compression)
    meta = pq.read_metadata(io.BytesIO(out.getvalue()))
    spans = []
    for number in range(meta.num_row_groups):
        columns = [meta.row_group(number).column(each) for each in range(meta.num_columns)]
        first = min(each.dictionary_page_offset or each.data_page_offset for each in columns)
        spans.append((first, first + sum(each.total_compressed_size for each in columns)))
    return out.getvalue(), spans


@fuzzed
@given(
    st.sampled_from(["none", "zstd"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    st.booleans(),
)
def test_damage_in_a_table_costs_the_row_groups_that_it_hits(
    tmp_path_factory: pytest.TempPathFactory, compression: str, changes: list[tuple[int, int]], footer: bool
) -> None:
    root = tmp_path_factory.mktemp("groups")
    whole, spans = table_bytes(compression)
    data, end = bytearray(whole), spans[-1][1]
    places = []
    for place, value in changes:
        place = place % len(data) if footer else 4 + place % (end - 4)
        data[place] = value
        places.append(place)
    (root / "x.parquet").write_bytes(data)
    record, _ = ingested(root / "x.parquet", root / "out")
    if any(place >= end or place < 4 for place in places):
        return  # the footer says what the file is: it must not crash, and counts add up
    assert record["samples"] + record["quarantined"] == 40
    found = kept(root / "out", record)
    for number, (first, last) in enumerate(spans):
        if not any(first <= place < last for place in places):
            for row in range(4 * number, 4 * number + 4):
                assert found[str(row)]["anchor"] == LONG[row]
                assert found[str(row)]["positive"] == LONG[::-1][row]


def test_values_that_are_none_in_python_cost_their_rows(tmp_path: Path) -> None:
    bad = pa.array([b"fine", b"\xff\xfe", b"fine"]).cast(pa.binary())
    text = pa.StringArray.from_buffers(3, *bad.buffers()[1:])
    late = pa.array([0, 0, 2**62], pa.int64()).cast(pa.timestamp("us"))
    table = pa.table({"anchor": text, "positive": ["a", "b", "c"], "when": late, "raw": pa.array([b"\0"] * 3)})
    pq.write_table(table, tmp_path / "x.parquet")
    record, rejected = ingested(tmp_path / "x.parquet", tmp_path / "out")
    assert [(row["key"], row["reason"]) for row in rejected] == [("x/1", "invalid_utf8"), ("x/2", "wrong_type")]
    [row] = kept(tmp_path / "out", record).values()
    assert (row["anchor"], json.loads(row["meta"])) == ("fine", {"when": "1970-01-01T00:00:00"})


@fuzzed
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3), st.floats(0, 1))
def test_a_damaged_compressed_file_of_lines_keeps_what_is_before(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], length: float
) -> None:
    root = tmp_path_factory.mktemp("lines")
    lines = [json.dumps({"anchor": text, "positive": text[::-1]}) for text in LONG]
    data = bytearray(gzip.compress("\n".join(lines).encode()))
    for place, value in changes:
        data[place % len(data)] = value
    (root / "x.jsonl.gz").write_bytes(data[: int(len(data) * length)])
    record, rejected = ingested(root / "x.jsonl.gz", root / "out")
    if data == gzip.compress("\n".join(lines).encode()):
        assert all(row["anchor"] == LONG[int(key)] for key, row in kept(root / "out", record).items())
    assert record["samples"] or rejected or length < 1


TEXT_STAGES: list[Any] = [
    "caption", "characters", "repetition", "boilerplate", "caption_template", "clean_text", "length_ratio",
    "exact_duplicate", {"text_duplicate": {"shingle": 1}},
]  # fmt: skip


@settings(fuzzed, max_examples=12)
@given(st.lists(st.tuples(st.text(max_size=60), st.text(max_size=60)), min_size=1, max_size=12))
@example([("\ud7ff\U0010ffff\0\r\n" * 3, "\u202e\u0301" * 9), ("é" * 50, "﷽" * 20)])
def test_no_text_stops_the_text_stages_and_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("texts")
    corpus = text_corpus(root / "c", [pairs, []])
    rows = run_plan(corpus, root / "o", TEXT_STAGES).to_pylist()  # checks the sums
    assert [(row["anchor"], row["positive"]) for row in rows] == pairs
    assert all((row["drop_stage"] is None) == (row["drop_reason"] is None) for row in rows)
