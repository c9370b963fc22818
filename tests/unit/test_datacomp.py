"""DataComp's files: the bytes of its documentation's own recipe, and selections by brute force."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cl import cli
from cl.errors import ConfigError, DataError
from pipelines.datacomp import read_subset, select_uids, subset
from tests.curation_corpora import run_plan
from tests.unit.corpora import image_corpus


def published(uids: list[str]) -> bytes:
    """The file as DataComp's documentation says to write it."""
    pairs = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8"))
    pairs.sort()
    out = io.BytesIO()
    np.save(out, pairs)
    return out.getvalue()


def metadata(folder: Path, rows: int = 90) -> list[dict[str, Any]]:
    """Three files with the columns of the pool's metadata."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, rows) / 12  # many are equal
    made = [
        {
            "uid": f"{int(rng.integers(2**63)) * (i % 9 > 0):016x}{int(rng.integers(2**63)) * 2 + 1:016x}",
            "url": f"https://example.org/{i}.jpg",
            "text": f"picture {i}",
            "original_width": int(rng.integers(50, 900)),
            "original_height": int(rng.integers(50, 900)),
            "clip_b32_similarity_score": None if i % 11 == 0 else float(scores[i]),
            "clip_l14_similarity_score": float("nan") if i % 13 == 0 else float(scores[-i]),
        }
        for i in range(rows)
    ]
    folder.mkdir()
    for number in range(3):
        pq.write_table(pa.Table.from_pylist(made[number::3]), folder / f"{number:08d}.parquet", row_group_size=7)
    return made


def test_a_subset_of_the_metadata_is_byte_for_byte_the_published_file(tmp_path: Path) -> None:
    rows = metadata(tmp_path / "metadata")
    out = str(tmp_path / "s.npy")
    result = subset([str(tmp_path / "metadata")], out, minimum={"clip_b32_similarity_score": 0.5})
    wanted = [row["uid"] for row in rows if (row["clip_b32_similarity_score"] or 0) >= 0.5]
    assert Path(out).read_bytes() == published(wanted)
    assert (result.uids, result.rows) == (len(wanted), 90)
    assert 20 < len(wanted) < 70
    assert read_subset(out).tolist() == sorted((int(uid[:16], 16), int(uid[16:], 16)) for uid in wanted)


def test_the_top_fraction_is_exact_and_ties_go_to_the_smaller_uid(tmp_path: Path) -> None:
    rows = metadata(tmp_path / "metadata")
    passing = [row for row in rows if row["original_width"] >= 200 and row["original_width"] <= 700]
    passing = [row for row in passing if not np.isnan(row["clip_l14_similarity_score"])]
    passing.sort(key=lambda row: (-row["clip_l14_similarity_score"], row["uid"]))
    wanted = [row["uid"] for row in passing[: round(0.3 * len(passing))]]
    bounds = {"original_width": 200.0}, {"original_width": 700.0}
    found, total = select_uids([str(tmp_path / "metadata")], *bounds, ("clip_l14_similarity_score", 0.3))
    assert total == 90
    assert [f"{a:016x}{b:016x}" for a, b in found.tolist()] == sorted(wanted)


def test_a_corpus_gives_the_uids_of_its_samples_and_a_subset_selects_them(tmp_path: Path) -> None:
    corpus = image_corpus(tmp_path / "c", fragments=2, rows=10, row_group=5)
    uids = [f"{number * 7919:032x}" for number in range(20)]
    for number, fragment in enumerate(corpus.fragments):
        path = tmp_path / "c" / fragment.path
        table = pq.read_table(path)
        meta = [json.dumps({"uid": uid}) for uid in uids[number * 10 : number * 10 + 10]]
        if number:
            meta[4], meta[5] = None, json.dumps({"other": 1})  # type: ignore[call-overload]
        at = table.schema.get_field_index("meta")
        pq.write_table(table.set_column(at, "meta", pa.array(meta, pa.string())), path, row_group_size=5)
    out = str(tmp_path / "s.npy")
    result = subset([corpus.root], out)
    assert (result.uids, result.rows, result.without_uid) == (18, 20, 2)
    assert Path(out).read_bytes() == published([uid for number, uid in enumerate(uids) if number not in (14, 15)])
    (tmp_path / "few.npy").write_bytes(published([*uids[3:7], uids[12], "f" * 32]))
    rows = run_plan(corpus, tmp_path / "o", [{"subset": {"path": str(tmp_path / "few.npy")}}]).to_pylist()
    assert [row["drop_reason"] for row in rows] == [
        None if number in (3, 4, 5, 6, 12) else "no_uid" if number in (14, 15) else "not_in_subset"
        for number in range(20)
    ]
    (tmp_path / "plain").write_bytes(np.load(tmp_path / "few.npy").tobytes())  # as a memory map is saved
    assert read_subset(str(tmp_path / "plain")).tolist() == read_subset(str(tmp_path / "few.npy")).tolist()
    with pytest.raises(ConfigError, match="is a corpus, of which all samples are written"):
        subset([corpus.root], out, minimum={"x": 1.0})


def test_what_is_not_datacomps_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata(tmp_path / "metadata", rows=6)
    place = str(tmp_path / "metadata")
    with pytest.raises(DataError, match=r"has no column 'score'; it has uid, url"):
        select_uids([place], {"score": 1.0})
    with pytest.raises(DataError, match="column 'text' is string, expected numbers"):
        select_uids([place], {"text": 1.0})
    pq.write_table(pa.table({"uid": ["xyz"]}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match="uid 'xyz' is not a number of up to 32 hex digits"):
        select_uids([str(tmp_path / "bad.parquet")])
    np.save(tmp_path / "floats.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"holds float64 of shape \[3\]"):
        read_subset(str(tmp_path / "floats.npy"))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match="is not a readable npy file"):
        read_subset(str(tmp_path / "objects.npy"))
    with pytest.raises(DataError, match=r"No sample of .* has a uid"):
        subset([image_corpus(tmp_path / "c", 1, 3).root], str(tmp_path / "s.npy"))
    for words in (["--min", "text"], ["--top", "clip_l14_similarity_score=2"]):
        with pytest.raises(SystemExit):
            cli.main(["subset", place, "--out", str(tmp_path / "s.npy"), *words])
    assert "must have the form COLUMN=NUMBER" in capsys.readouterr().err
    cli.main(["subset", place, "--out", str(tmp_path / "s.npy"), "--top", "clip_l14_similarity_score=1", "--json"])
    assert json.loads(capsys.readouterr().out)["uids"] == 5
