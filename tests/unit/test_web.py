"""One URL at a time against a real server that misbehaves, and what may be asked for at all."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from cl.errors import DataError
from pipelines.inputs import find_tables
from pipelines.web import Refused
from pipelines.web.addresses import check_url, is_public
from pipelines.web.consent import opted_out
from pipelines.web.fetch import Client, FetchConfig, retry_after
from pipelines.web.tables import Row, check_table, read_rows
from tests.curation_corpora import picture
from tests.web_server import Web

QUICK = FetchConfig(allow_private=True, timeout=1.0, backoff=0.02, host_rate=1000, retries=2, max_bytes=1 << 20)


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


def fetched(config: FetchConfig, *urls: str) -> list[bytes | Refused]:
    async def all_of_them() -> list[bytes | Refused]:
        async with Client(config) as client:
            return list(await asyncio.gather(*(client.fetch(url) for url in urls)))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(
    ("path", "reason", "requests"),
    [
        ("/status/404.jpg", "http_404", 1),
        ("/status/410.jpg", "http_410", 1),
        ("/status/503.jpg", "http_503", 3),
        ("/later/1", "http_503", 1),  # asks for more patience than max_wait
        ("/hang/1", "timeout", 3),
        ("/huge/1", "too_large", 1),
        ("/short/1", "unreachable", 3),
        ("/loop/0", "too_many_redirects", 1),
        ("/secret/a.jpg", "robots_disallowed", 0),
        ("/not-for-clew", "robots_disallowed", 0),
        ("/to/127.0.0.1:1/x", "unreachable", 1),
        ("/tagged/noai", "opted_out", 1),
        ("/tagged/noimageai", "opted_out", 1),
        ("/tagged/dated", "opted_out", 1),
        ("/tagged/tdm", "opted_out", 1),
    ],
)
def test_every_fault_has_its_reason(web: Web, path: str, reason: str, requests: int) -> None:
    # A group that is named for clew stands in the place of that for all others (RFC 9309, 2.2.1).
    web.robots = b"User-agent: clew\nDisallow: /not-for-clew\nDisallow: /secret/\nAllow: /secret/open-*.jpg$\n"
    timeout = 0.2 if path == "/hang/1" else 5.0
    [found] = fetched(QUICK.model_copy(update={"timeout": timeout}), web.url + path)
    assert isinstance(found, Refused)
    assert found.reason == reason, found
    assert web.asked[path] == requests


@pytest.mark.parametrize("path", ["/moved/5.jpg", "/busy/5", "/image/5.jpg"])
def test_what_is_late_or_moved_arrives(web: Web, path: str) -> None:
    assert fetched(QUICK, web.url + path) == [picture(5)]


@pytest.mark.parametrize("path", ["/tagged/other-bot", "/tagged/tdm-free", "/secret/open-1.jpg"])
def test_what_is_allowed_is_fetched(web: Web, path: str) -> None:
    web.robots = b"User-agent: clew\nDisallow: /secret/\nAllow: /secret/open-*.jpg$\n"
    assert isinstance(fetched(QUICK, web.url + path)[0], bytes)


def test_opt_outs_and_robots_count_unless_the_config_says_otherwise(web: Web) -> None:
    web.robots = b"User-agent: *\nDisallow: /\n"
    careless = QUICK.model_copy(update={"robots": False, "opt_out": ()})
    assert all(isinstance(found, bytes) for found in fetched(careless, f"{web.url}/tagged/noai", f"{web.url}/secret/a"))
    assert fetched(QUICK, f"{web.url}/image/1.jpg")[0].reason == "robots_disallowed"  # type: ignore[union-attr]


@pytest.mark.parametrize(("status", "allowed"), [(404, True), (403, True), (503, False), (429, False)])
def test_a_host_without_rules_allows_and_one_that_cannot_be_asked_forbids(web: Web, status: int, allowed: bool) -> None:
    web.robots = status  # RFC 9309, 2.3.1.3 and 2.3.1.4
    [found] = fetched(QUICK, f"{web.url}/image/2.jpg")
    assert isinstance(found, bytes) == allowed


def test_robots_are_asked_once_and_the_agent_tells_its_name(web: Web) -> None:
    web.robots = b""
    before = web.asked["/robots.txt"]
    found = fetched(QUICK.model_copy(update={"user_agent": "shop/2"}), *(f"{web.url}/image/{n}.jpg" for n in range(9)))
    assert found == [picture(n) for n in range(9)]
    assert web.asked["/robots.txt"] == before + 1
    assert "shop/2" in web.agents


@pytest.mark.parametrize(("config", "robots"), [({"host_rate": 20.0}, b""), ({}, b"User-agent: *\nCrawl-delay: 0.05")])
def test_a_host_is_asked_no_faster_than_its_rate(web: Web, config: dict[str, Any], robots: bytes) -> None:
    web.robots = robots
    paths = [f"/image/{number}.jpg?{config}" for number in range(5)]
    fetched(QUICK.model_copy(update=config), *(f"{web.url}{path}".replace(" ", "") for path in paths))
    came = sorted(times[-1] for path, times in web.times.items() if path.partition("?")[2])[-5:]
    assert came[-1] - came[0] > 4 * 0.05 - 0.02  # a lower bound: a slow machine only makes it longer


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "10.1.2.3", "169.254.169.254", "0.0.0.0", "[::ffff:10.0.0.1]", "127.1",
     "2130706433", "[64:ff9b::7f00:1]", "224.0.0.1", "100.64.0.1"],
)  # fmt: skip
def test_no_private_address_is_ever_asked(web: Web, host: str) -> None:
    before = sum(web.asked.values())
    port = web.server.server_port
    [found] = fetched(FetchConfig(retries=0, robots=False), f"http://{host}:{port}/image/1.jpg")
    assert isinstance(found, Refused)
    strange = host in ("127.1", "2130706433")  # what the C library takes for an address
    assert found.reason == ("bad_url" if strange else "private_address"), found
    assert sum(web.asked.values()) == before


def test_public_addresses_are_public() -> None:
    assert all(is_public(each) for each in ("1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "::ffff:1.1.1.1"))
    assert not any(is_public(each) for each in ("192.168.1.1", "fe80::1%eth0", "fd00::1", "2002:7f00:1::1"))


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://example.org/a", "//example.org/a", "http://", "http://a:99999/", "a b", ""]
)
def test_only_http_is_asked(url: str) -> None:
    found = check_url(url, allow_private=True)
    assert isinstance(found, Refused)
    assert found.reason == "bad_url"


@given(st.text())
def test_any_text_is_a_url_or_refused(text: str) -> None:
    check_url(text, allow_private=False)


def test_headers_speak_to_all_crawlers_or_to_one() -> None:
    def said(*values: str) -> bool:
        headers = CIMultiDict([("x-robots-tag", value) for value in values])
        return opted_out(headers, "clew", ("noai", "noindex")) is not None

    assert said("noai")
    assert said("nofollow", "index, NoAI ")
    assert said("clew: noindex")
    assert said("unavailable_after: 25 Jun 2010, noai")
    assert not said("other: noai")
    assert not said("noimageindex")
    assert not said()


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after("1.5") == 1.5
    assert retry_after("Fri, 01 Jan 2010 00:00:00 GMT") == 0
    assert retry_after("soon") is None
    assert retry_after(None) is None


ROWS: list[dict[str, Any]] = [
    {"url": "http://a/1", "text": " one ", "uid": "k1", "sha": "AB", "score": 0.5},
    {"url": None, "text": "two", "uid": "k2", "sha": "ab", "score": 1.0},
    {"url": "http://a/3", "text": None, "uid": "k3", "sha": "ab", "score": 1.0},
    {"url": "http://a/4", "text": "four", "uid": "k1", "sha": "ab", "score": 1.0},
    {"url": "http://a/5", "text": "five", "uid": None, "sha": "ab", "score": 1.0},
    {"url": "http://a/6", "text": "six, with\nlines", "uid": "k6", "sha": None, "score": 1.0},
]
COLUMNS = {"key": "uid", "sha256": "sha"}
SEEN = ["k1", "missing_url", "missing_caption", "duplicate_key", "missing_key", "missing_hash"]


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        tab = "\t" if ".tsv" in path.name else ","
        cells = [[str("" if value is None else value) for value in row.values()] for row in rows]
        lines = [tab.join(f'"{cell}"' for cell in line) for line in [list(rows[0]), *cells]]
        data = "\ufeff".encode() + "\r\n".join(lines).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.csv", "t.tsv.gz"])
def test_tables_of_every_form_give_the_same_rows(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name, ROWS)
    [table] = find_tables([str(tmp_path / name)], None)
    rows = list(read_rows(table, COLUMNS))
    assert [row.reason or row.key for row in rows] == SEEN
    first = rows[0]
    assert (first.url, first.text, first.hash) == ("http://a/1", "one", "sha256:ab")
    assert json.loads(first.meta or "")["url"] == "http://a/1"
    assert float(json.loads(first.meta or "")["score"]) == 0.5
    assert [row.key for row in read_rows(table, {})] == [str(number) for number in range(6)]


def test_damage_in_a_table_costs_its_rows_and_a_missing_column_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"url,text\nhttp://a,one\nhttp://b\nhttp://c,\xff\nhttp://d,four\n")
    (tmp_path / "b.jsonl").write_text('{"url": "http://a", "text": "one"}\nno json\n{"url": 5, "text": "x"}\n')
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    (tmp_path / "d.jsonl").write_text('{"URL": "http://a", "text": "one"}\n')
    tables = find_tables([str(tmp_path / name) for name in ("a.csv", "b.jsonl", "c.parquet", "d.jsonl")], "web")
    seen = [[row.reason for row in read_rows(table, {})] for table in tables[:3]]
    assert seen == [
        [None, "wrong_type", "invalid_utf8", None], [None, "invalid_json", "wrong_type"], ["unreadable_shard"]
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"no column 'url'; it has URL, text \(map it with columns.url=...") as error:
        check_table(tables[3], {})
    assert str(error.value).startswith(str(tmp_path / "d.jsonl"))
    assert next(iter(read_rows(tables[3], {"url": "URL"}))) == Row("0", "http://a", "one", None, '{"URL":"http://a"}')
