"""The report on what the parts really write: the shipped sample through ingest, curate, train and eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pipelines.sample
from cl import storage
from cl.config import parse_config
from cl.evaluation.config import EvalConfig
from cl.evaluation.run import evaluate
from cl.training.config import TrainConfig
from cl.training.run import train
from pipelines.curate import CurateConfig, curate
from pipelines.ingest import IngestConfig, ingest
from pipelines.report.build import build_report
from pipelines.report.summary import summarise
from tests.browser import find_browser
from tests.end_to_end.test_report_in_browser import look
from tests.training_corpus import TINY_MODEL

STAGES = [
    {"caption": {"min_words": 2}},
    {"image_size": {"min_side": 32}},
    {"exact_duplicate": {}},
    {"near_duplicate": {}},
]


@pytest.mark.slow
def test_report_of_real_runs(ray_session: None, tmp_path: Path) -> None:
    shards = Path(pipelines.sample.__file__).parent / "train"
    names = ("clipart-00001.tar", "planted-truncated-00000.tar")
    came = ingest(IngestConfig(inputs=[str(shards / name) for name in names], out=str(tmp_path / "corpus")))
    curated = curate(
        parse_config(
            CurateConfig,
            {"corpus": str(tmp_path / "corpus"), "out": str(tmp_path / "curated"), "stages": STAGES},
            "test",
        )
    )
    settings: dict[str, Any] = {
        "out": str(tmp_path / "model"),
        "corpus": str(tmp_path / "curated"),
        "model": TINY_MODEL,
    }
    settings |= {"batch_size": 32, "steps": 5, "log_every": 1, "precision": "fp32", "workers": {"count": 0}}
    trained = train(parse_config(TrainConfig, settings, "test"))
    wanted: dict[str, Any] = {
        "checkpoint": str(tmp_path / "model"),
        "corpora": {"curated": {"path": str(tmp_path / "curated"), "limit": 100}},
    }
    evaluated = evaluate(parse_config(EvalConfig, wanted | {"out": str(tmp_path / "eval")}, "test"))

    result = build_report([str(tmp_path)], str(tmp_path / "report.html"))
    assert result.problems == []
    assert result.runs == {"corpus": "ingest", "curated": "curate", "model": "train", "eval": "eval"}
    page = (tmp_path / "report.html").read_text()
    assert "its shard is no longer there" not in page
    assert "the picture cannot be decoded" not in page
    for words in (
        "Loss",
        "✓ right",
        "text to image: the query",
        "image to text: the query",
        "duplicate of",
        "distance: ",
    ):
        assert words in page, words

    found = {(row.group.split(" ")[0], row.name): row for row in summarise([str(tmp_path)]).rows}
    assert found["Ingest", "samples"].number == came.samples
    assert (
        found["Ingest", "quarantined"].number == came.quarantined == sum(found["Ingest", "quarantined"].parts.values())
    )
    assert found["Curation", "kept"].number == curated.kept
    assert found["Curation", "dropped"].number == sum(curated.dropped.values())
    assert found["Training", "steps"].number == trained.steps == 5
    figure = evaluated.corpora["curated"].figure("retrieval/text_to_image/R@1")
    assert found["Evaluation", "text to image R@1"].number == figure.value
    funnel = storage.read_json(str(tmp_path / "curated" / "funnel.json"))
    assert [stage["stage"].replace("_", " ") in page for stage in funnel["stages"]] == [True] * len(funnel["stages"])
    if find_browser() is not None:  # test_report_in_browser says where there is none
        look(tmp_path / "report.html", 390, True, result.pictures)
