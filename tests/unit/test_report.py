"""The report on run folders written to the layouts on disk: what it shows, what it says is missing, what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cl import storage
from cl.corpus import Corpus, Fragment, sample_schema
from cl.errors import DataError
from pipelines.report import build, charts
from pipelines.report.build import MAX_BYTES, build_report
from pipelines.report.corpora import decided_by
from pipelines.report.pictures import Thumbnails, thumbnail
from pipelines.report.runs import find_runs
from pipelines.report.summary import summarise
from pipelines.report.wording import clean, count, duration, number, percent
from tests import report_runs


class Page(HTMLParser):
    """The tags, attributes and words of a page, as a browser would take them apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_runs.all_runs(tmp_path_factory.mktemp("runs"))


def make(dirs: list[Path], out: Path) -> tuple[str, build.ReportResult]:
    result = build_report([str(each) for each in dirs], str(out))
    return out.read_text(), result


def test_one_page_shows_every_kind_of_run(runs: Path, tmp_path: Path) -> None:
    text, result = make([runs], tmp_path / "report.html")
    page = Page(text)
    assert set(result.runs.values()) == {"ingest", "curate", "train", "eval", "sweep"}
    assert result.problems == []
    assert result.pictures == text.count("data:image/webp;base64,") > 60
    assert result.bytes == len(text.encode()) < MAX_BYTES
    for words in (
        "Funnel",
        "aspect too large",
        "near duplicate",
        "Languages",
        "Clusters",
        "Quarantine",
        "image truncated",
        "Loss",
        "Learning rate",
        "retrieval/text_to_image/R@1",
        "✓ right",
        "Trials",
        "Lineage",
        "2.60.0",
        "Resolved config",
    ):
        assert words in page.words, words
    # Every run has its entry in the table of contents, and every link of the page has its target.
    targets = {value for name, value in page.attributes if name == "id"}
    links = {(value or "").removeprefix("#") for name, value in page.attributes if name == "href" and value != "data:,"}
    assert links <= targets
    assert len([link for link in links if link.startswith("run-")]) == 5


def test_page_is_self_contained_and_strict(runs: Path, tmp_path: Path) -> None:
    text, _ = make([runs], tmp_path / "report.html")
    page = Page(text)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert not {"script", "iframe", "object", "embed", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href"):
            assert (value or "").startswith(("data:", "#")), value
    assert not re.search(r"url\(|@import", text)


def test_hostile_captions_and_keys_are_text(runs: Path, tmp_path: Path) -> None:
    text, _ = make([runs], tmp_path / "report.html")
    page = Page(text)
    assert "<script>alert" not in text
    assert "<b>mute" not in text
    assert "<script>alert('caption')</script>" in page.words  # it is there to be read
    assert "<b>mute</b>" in page.words
    assert "\u202e" not in text  # the character that would turn the line around


def test_hostile_names_everywhere_are_text(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\"'><script>x</script>"
    report_runs.sweep_run(tmp_path / "swept")
    data = json.loads((tmp_path / "swept" / "sweep.json").read_text())
    data["metric"] = data["axes"][0] = data["trials"][0]["status"] = data["trials"][0]["id"] = evil
    for trial in data["trials"]:
        trial["parameters"] = {evil: trial["parameters"]["objective.temperature"], "batch_size": evil}
    data["best"]["parameters"] = {evil: evil}
    storage.write_json(str(tmp_path / "swept" / "sweep.json"), data)
    report_runs.train_run(tmp_path / "trained", tmp_path)
    (tmp_path / "trained" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, evil: 3.0}) + "\n")
    (tmp_path / "trained" / "config.yaml").write_text(f"note: {evil!r}\n")
    storage.write_json(
        str(tmp_path / "trained" / "run.json"),
        {"command": "train", "status": evil, "versions": {evil: evil}, "error": evil},
    )
    storage.write_json(
        str(tmp_path / "evaluated" / "eval.json"),
        {
            "checkpoint": evil,
            "corpora": {
                evil: {
                    "samples": 1,
                    "metrics": [{"metric": evil, "value": 1}],
                    "examples": [{"query": evil, "top": [evil], "rank": 1}],
                }
            },
        },
    )
    text, _ = make([tmp_path], tmp_path / "report.html")
    page = Page(text)
    assert not {"script"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.words.count("<script>x</script>") > 5


def test_near_duplicates_stand_beside_what_they_duplicate(runs: Path, tmp_path: Path) -> None:
    text, _ = make([runs / "curated"], tmp_path / "report.html")
    assert (
        text.count('<span class="tag">dropped</span>') == text.count('<span class="tag kept">duplicate of</span>') == 6
    )


@pytest.mark.parametrize(
    ("stage", "reason", "expected"),
    [
        ("caption", "too_few_words", {"words": "1"}),
        ("caption", "too_few_characters", {"chars": "4"}),
        ("caption", "other_language", {"language": "fr", "language score": "0.66"}),
        ("image_size", "aspect_too_long", {"size": "80 × 20", "aspect": "4"}),
        ("near_duplicate", "near_duplicate", {"distance": "3"}),
        ("image_text_score", "score_outside_top", {"image text score": "-0.139"}),
        ("semantic_duplicate", "semantic_duplicate", {}),
        ("balance", "cluster_over_cap", {"cluster": "7", "cluster distance": "0.5"}),
        (None, None, {}),
    ],
)
def test_the_values_behind_a_drop(stage: str | None, reason: str | None, expected: dict[str, str]) -> None:
    row = {
        "id": "0",
        "text": "café",
        "text_words": 1,
        "text_chars": 4,
        "text_language": "fr",
        "text_language_score": 0.66,
    }
    row |= {"width": 80, "height": 20, "aspect": 4.0, "near_duplicate_of": "1", "near_duplicate_distance": 3}
    row |= {"image_text_score": -0.1391, "cluster": 7, "cluster_distance": 0.5, "exact_duplicate_of": None}
    assert dict(decided_by(row | {"drop_stage": stage, "drop_reason": reason})) == expected


def test_summary_is_what_the_files_say(runs: Path) -> None:
    summary = summarise([str(runs)])
    found = {(row.group.split(" ")[0], row.name): row for row in summary.rows}
    funnel = storage.read_json(str(runs / "curated" / "funnel.json"))
    assert found["Curation", "samples in"].number == funnel["in"] == 96
    assert found["Curation", "kept"].number == funnel["kept"]
    dropped = found["Curation", "dropped"]
    assert dropped.number == sum(dropped.parts.values()) == funnel["in"] - funnel["kept"]
    assert list(dropped.parts.values()) == sorted(dropped.parts.values(), reverse=True)
    assert found["Ingest", "quarantined"].number == 2
    assert found["Training", "steps"].number == 120
    assert (found["Evaluation", "text to image R@1"].value, found["Evaluation", "text to image R@1"].chance) == (
        "22.3 %",
        "1.04 %",
    )
    assert "zero shot accuracy" in {name for group, name in found if group == "Evaluation"}
    assert found["Sweep", "best trial"].value == "temperature 0.05, batch_size 256"
    assert summary.table().row_count == len(summary.rows)


def test_folders_are_told_by_their_files_without_run_json(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs, copy)
    for record in copy.glob("*/run.json"):
        record.unlink()
    assert [(run.name, run.kind) for run in find_runs([str(copy)])] == [
        ("corpus", "ingest"), ("curated", "curate"), ("trained", "train"), ("evaluated", "eval"), ("swept", "sweep"),
    ]  # fmt: skip


def test_runs_of_the_same_name_are_told_apart_and_none_is_shown_twice(runs: Path, tmp_path: Path) -> None:
    for side in ("a", "b"):
        report_runs.sweep_run(tmp_path / side / "swept")
    found = find_runs([str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "swept") + "/"])
    assert [run.name for run in found] == ["a/swept", "b/swept"]
    assert len({run.anchor for run in found}) == 2


def test_unfinished_and_damaged_runs_are_said_so(runs: Path, tmp_path: Path) -> None:
    report_runs.train_run(tmp_path / "trained", runs / "curated", finished=False)
    report_runs.run_json(tmp_path / "failed", "eval", status="failed", error="DataError: The corpus is gone.")
    report_runs.run_json(tmp_path / "stopped", "curate", status="interrupted")
    report_runs.sweep_run(tmp_path / "swept")
    (tmp_path / "swept" / "sweep.json").write_text('{"metric": "R@1", "tri')
    (tmp_path / "embedded").mkdir()
    report_runs.run_json(tmp_path / "embedded", "embed")
    text, result = make([tmp_path], tmp_path / "report.html")
    said = "\n".join(result.problems)
    assert "trained: 1 line of metrics.jsonl could not be read." in said
    assert "trained: This run had not ended when this page was made." in said
    assert "failed: This run failed: DataError: The corpus is gone." in said
    assert "stopped: This run was interrupted." in said
    assert "stopped: funnel.json is missing: the run has not got that far." in said
    assert "is not valid JSON" in said
    assert all(clean(problem.split(": ", 1)[1], 400) in Page(text).words for problem in result.problems)
    assert len(set(result.problems)) == len(result.problems)


def test_a_lost_shard_and_a_broken_picture_leave_a_placeholder(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs"
    report_runs.curate_run(copy / "curated", report_runs.ingest_run(copy / "corpus"))
    for tar in (copy / "corpus" / "heavy").iterdir():
        tar.unlink()
    text, result = make([copy], tmp_path / "report.html")
    assert result.pictures == 0
    assert "its shard is no longer there" in text
    text, _ = make([runs / "curated"], tmp_path / "report.html")
    assert "the picture cannot be decoded" in text


def test_pictures_stay_within_their_budget(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PICTURE_BYTES", 20_000)
    text, result = make([runs], tmp_path / "report.html")
    assert 0 < sum(map(len, re.findall(r'"(data:image/webp[^"]*)"', text))) <= 20_000
    assert "left out to keep this page small" in text
    assert result.pictures == text.count("data:image/webp")


def test_text_pairs_are_shown_as_text(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"{k:032x}",
            "source": "pairs",
            "key": str(k),
            "shard": "samples/00000.parquet",
            "content": f"{k:032x}",
            "meta": None,
            "anchor": f"question {k}",
            "positive": f"answer {k} <i>",
            "negatives": ["no"],
        }
        for k in range(40)
    ]
    storage.write_table(
        str(tmp_path / "pairs/samples/00000.parquet"), pa.Table.from_pylist(rows, sample_schema("text-text"))
    )
    fragment = Fragment(path="samples/00000.parquet", samples=40, shard="samples/00000.parquet", row_groups=[40])
    Corpus(kind="text-text", samples=40, fragments=[fragment]).write(str(tmp_path / "pairs"))
    examples = [
        {
            "direction": "anchor_to_positive",
            "query": "question 1",
            "query_id": rows[1]["id"],
            "rank": 2,
            "top": [rows[0]["id"], rows[1]["id"]],
            "top_texts": ["answer 0", "answer 1"],
            "top_scores": [0.9, 0.8],
            "top_correct": [False, True],
        }
    ]
    corpora = {"pairs": {"path": str(tmp_path / "pairs"), "samples": 40, "metrics": [], "examples": examples}}
    storage.write_json(str(tmp_path / "evaluated/eval.json"), {"checkpoint": "c", "corpora": corpora})
    text, result = make([tmp_path], tmp_path / "report.html")
    page = Page(text)
    assert result.pictures == 0
    assert "question 3" in page.words
    assert "answer 3 <i>" in page.words
    assert "Words of an anchor" in page.words
    assert text.index("answer 0") < text.index("✓ right")


def test_what_cannot_be_reported_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        build_report([str(tmp_path / "nowhere")], str(tmp_path / "report.html"))
    with pytest.raises(DataError, match="No run was found in"):
        build_report([str(tmp_path)], str(tmp_path / "report.html"))
    with pytest.raises(DataError, match="No run was found"):
        summarise([])
    report_runs.sweep_run(tmp_path / "swept")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        build_report([str(tmp_path / "swept")], str(tmp_path / "file" / "report.html"))


def test_thumbnails_of_odd_images(tmp_path: Path) -> None:
    import io

    from PIL import Image

    for mode, format_ in (
        ("RGBA", "PNG"),
        ("P", "GIF"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("1", "PNG"),
        ("I;16", "PNG"),
        ("LA", "PNG"),
    ):
        out = io.BytesIO()
        Image.new(mode, (500, 3)).save(out, format_)
        uri, width, height = thumbnail(out.getvalue())
        assert uri.startswith("data:image/webp;base64,")
        assert (width, height) == (112, 1), mode
    out = io.BytesIO()
    Image.new("1", (9000, 9000)).save(out, "PNG")  # small in bytes, large in pixels
    for data in (out.getvalue(), b"", b"GIF89a", b"<svg/>"):
        with pytest.raises(DataError):
            thumbnail(data)
    assert Thumbnails(1000).of_sample([str(tmp_path)], {"shard": "../../etc/passwd"}, alt="").missing


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.12345), "0.123"), (number(12345.6), "12,346"), (number(1234), "1,234"), (number(5e-5), "5e-5"),
        (number(float("nan")), "nan"), (number(None), "-"), (number(99.96), "100"), (number(1e6), "1,000,000"),
        (count(1234567), "1,234,567"), (count(None), "-"), (percent(0.0104, 2), "1.04 %"),
        (duration(59.94), "59.9 s"), (duration(3700), "1 h 1 min"), (duration(119.9), "2 min 0 s"),
        (clean("a\x00b\nc" + "d" * 300, 10), "a�b cdddd…"),
    ],
)  # fmt: skip
def test_wording(shown: str, expected: str) -> None:
    assert shown == expected


def test_charts_hold_their_data() -> None:
    svg = str(charts.lines("<loss>", [charts.Series("a", range(10_000), np.linspace(5, 1, 10_000).tolist())]))
    points = re.findall(r"[\d.]+,[\d.]+", svg.split('points="')[1].split('"')[0])
    assert len(points) == charts.MAX_POINTS
    assert float(points[0].split(",")[1]) < float(points[-1].split(",")[1])  # it falls, and y grows downwards
    assert "&lt;loss&gt;" in svg
    assert charts.lines("x", [charts.Series("a", [1, 2], [float("nan"), float("inf")])]) == ""
    svg = str(charts.histogram("h", np.array([4, 2]), np.array([2, 0]), np.array([0.0, 1.0, 2.0])))
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" class="(?:before|after)"', svg)]
    assert heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert len(heights) == 3
    svg = str(charts.heat_map("m", ["a"], ["b", "c"], [[0.5, None]], "rows", "columns", (0, 0)))
    for part in ("0.5", 'class="hollow"', "heat best"):
        assert part in svg


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (1e-9, 2e-9), (5, 5), (0, 0), (1e12, 3e12)])
def test_ticks_span_the_range(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert found[0] <= low + abs(low) * 1e-6
    assert found[-1] >= high - abs(high) * 1e-6
    assert 2 <= len(found) <= 8
