"""`clew download` through Ray from a real server: every row is a sample or in the quarantine, nothing comes twice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cl.corpus import open_corpus, sample_id
from cl.errors import DataError
from pipelines.download import DownloadConfig, download
from pipelines.ingest import IngestConfig, ingest
from pipelines.remove import remove
from pipelines.verify import verify
from tests.curation_corpora import picture
from tests.curation_runs import ROOT, tree
from tests.end_to_end.clew import PATIENCE
from tests.web_server import Web

FETCH = {
    "allow_private": True,
    "timeout": 3.0,
    "backoff": 0.02,
    "host_rate": 1000.0,
    "retries": 1,
    "max_bytes": 1 << 20,
}


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


def write_urls(path: Path, urls: list[str], **columns: list[Any]) -> str:
    pq.write_table(pa.table({"url": urls, "text": [f"text of {n}" for n in range(len(urls))], **columns}), path)
    return str(path)


def quarantine(root: Path) -> dict[str, str]:
    files = sorted(root.glob("quarantine/*.parquet"))
    return {row["key"]: row["reason"] for file in files for row in pq.read_table(file).to_pylist()}


def test_every_row_is_a_sample_or_has_its_reason(web: Web, tmp_path: Path, ray_session: None) -> None:
    web.robots = b"User-agent: *\nDisallow: /secret/\n"
    paths = ["/image/0.jpg", "/status/404", "/busy/2", "/short/3", "/huge/4", "/loop/0", "/tagged/noai", "/secret/7",
             "/text/8", "/cut/9", "/image/10.jpg", "/image/11.jpg"]  # fmt: skip
    sums = [hashlib.sha256(picture(number)).hexdigest() for number in range(12)]
    sums[11] = sums[0]  # poisoned: the host now serves something else
    table = write_urls(tmp_path / "urls.parquet", [web.url + path for path in paths], sha256=sums)
    cfg = DownloadConfig(
        inputs=[table], out=str(tmp_path / "out"), shard_rows=5, columns={"sha256": "sha256"}, fetch=FETCH
    )
    result = download(cfg)
    reasons = {1: "http_404", 3: "unreachable", 4: "too_large", 5: "too_many_redirects", 6: "opted_out",
               7: "robots_disallowed", 8: "wrong_hash", 9: "wrong_hash", 11: "wrong_hash"}  # fmt: skip
    assert quarantine(tmp_path / "out") == {f"urls/{n}": why for n, why in reasons.items()}
    assert (result.rows, result.samples, result.quarantined, result.shards) == (12, 3, 9, 3)
    assert result.reasons["wrong_hash"] == 3
    rows = open_corpus(str(tmp_path / "out")).read().to_pylist()
    assert [row["id"] for row in rows] == [sample_id("urls", f"urls/{number}") for number in (0, 2, 10)]
    assert [row["text"] for row in rows] == ["text of 0", "text of 2", "text of 10"]
    assert json.loads(rows[1]["meta"])["url"] == f"{web.url}/busy/2"
    for row, number in zip(rows, (0, 2, 10), strict=True):
        shard = (tmp_path / "out" / row["shard"]).read_bytes()
        assert shard[row["offset"] : row["offset"] + row["length"]] == picture(number)
    assert not verify(str(tmp_path / "out"), deep=True).defects
    # The tars are webdataset shards of their own, and what comes out of them is the same.
    again = ingest(IngestConfig(inputs=[str(tmp_path / "out" / "shards")], out=str(tmp_path / "again")))
    assert again.samples == 3
    # Without the column of hashes the bytes are judged by themselves.
    plain = download(DownloadConfig(inputs=[table], out=str(tmp_path / "plain"), fetch=FETCH))
    assert {plain.reasons[why] for why in ("not_an_image", "truncated_image")} == {1}
    with pytest.raises(DataError, match="`clew download` made"):
        ingest(IngestConfig(inputs=[str(tmp_path / "out" / "shards")], out=str(tmp_path / "out")))


def test_a_removed_sample_is_gone_and_is_not_fetched_again(web: Web, tmp_path: Path, ray_session: None) -> None:
    table = write_urls(tmp_path / "urls.parquet", [f"{web.url}/image/{number}.jpg" for number in range(6)])
    cfg = DownloadConfig(inputs=[table], out=str(tmp_path / "out"), shard_rows=3, fetch=FETCH)
    download(cfg)
    gone = sample_id("urls", "urls/1")
    (tmp_path / "ids.txt").write_text(gone)
    remove([cfg.out], str(tmp_path / "ids.txt"))
    before, asked = tree(tmp_path / "out"), sum(web.asked.values())
    result = download(cfg)
    assert (result.samples, result.reasons, result.reused) == (5, {"removed": 1}, 2)
    assert tree(tmp_path / "out") == before
    assert sum(web.asked.values()) == asked
    # Even where everything is fetched anew.
    result = download(cfg.model_copy(update={"shard_rows": 2}))
    assert (result.samples, result.reasons) == (5, {"removed": 1})
    assert web.asked["/image/1.jpg"] == 1
    assert not verify(str(tmp_path / "out")).defects


def test_a_killed_run_goes_on_and_asks_for_no_finished_shard_again(web: Web, tmp_path: Path, ray_session: None) -> None:
    urls = [f"{web.url}/image/{number}.jpg" for number in range(12)]
    table = write_urls(tmp_path / "urls.parquet", urls)
    whole = DownloadConfig(inputs=[table], out=str(tmp_path / "whole"), shard_rows=4, fetch=FETCH)
    download(whole)
    web.asked.clear()
    web.gated = 8  # the last shard never comes
    killed = whole.model_copy(update={"out": str(tmp_path / "killed")})
    words = [f"fetch.{name}={str(value).lower()}" for name, value in (FETCH | {"timeout": 100.0}).items()]
    command = [sys.executable, "-m", "cl.cli", "download", table, "--out", killed.out, "shard_rows=4", "cpus=1", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CLEW_QUIET": "1"}
    environment.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while len(list((tmp_path / "killed").glob(".ingest/*.json"))) < 2 or not web.asked["/image/8.jpg"]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / "corpus.json").exists()
    web.gated = 1 << 30
    result = download(killed)
    assert result.reused == 2
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert all(web.asked[f"/image/{number}.jpg"] == 1 for number in range(8))
    asked = sum(web.asked.values())
    assert download(killed).reused == 3
    assert sum(web.asked.values()) == asked
