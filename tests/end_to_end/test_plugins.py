"""A package of a user's own adds an objective, a tower, a metric, a stage and more by entry points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.clew import clew, sentence
from tests.end_to_end.small_corpora import write_text_corpus

MODULE = '''
"""A package that knows Clew, but that Clew does not know."""
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from cl.batches.arrangements import Arrangement
from cl.config import Config
from cl.encoders.config import TowerConfig
from cl.encoders.inputs import TextInput
from cl.encoders.registry import TowerFamily
from cl.encoders.tokenizers import clip_bpe
from cl.evaluation.registry import Figure, Measured, Metric
from cl.objectives.base import Objective, Outcome
from cl.training.callbacks import Callback
from pipelines.stages.base import Output, RowStage, reasons


class BagConfig(TowerConfig):
    family: str = "bag"
    vocabulary: int = 1000


class Bag(TowerFamily):
    """Mean of word vectors."""

    config = BagConfig

    @staticmethod
    def build(cfg, embed_dim):
        return nn.EmbeddingBag(cfg.vocabulary, embed_dim)

    @staticmethod
    def inputs(cfg, train):
        return TextInput(clip_bpe(cfg.vocabulary, 16), masked=False)


class SquaresConfig(Config):
    strength: float = 1.0


class Squares(Objective):
    """Squared distance of pairs."""

    Config = SquaresConfig
    paper = "Squares: A Title of Our Own"

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, pairs, workers):
        first, second = (pairs.view(name) for name in pairs.views)
        return Outcome(self.config.strength * (first - second).square().sum(1).mean())


class Rows(Metric[Config]):
    """How many rows there are."""

    kinds = frozenset({"text-text"})

    def measure(self, data):
        return Measured([Figure(metric="rows/count", value=float(data.samples), chance=None, higher_is_better=True)])


class Shout(RowStage):
    """Drop anchors in capital letters."""

    drops: ClassVar[bool] = True
    kinds: ClassVar = ("text-text",)

    def needs(self, kind):
        return ["anchor"]

    def run(self, rows):
        loud = np.array([text.isupper() for text in rows.texts("anchor")], bool)
        return Output(drop=reasons(len(rows), {"capitals": loud}))


class Turned(Arrangement):
    """The last sample of a pool is the first."""

    def deal(self, keys, home, sizes, seed):
        print("turned", len(keys), file=open("turned.txt", "w"))
        return home[::-1] if len(set(sizes)) == 1 else home


class Diary(Callback):
    """Notes the end of a run."""

    class Config(Config):
        path: str

    def on_end(self, progress):
        Path(self.config.path).write_text(f"{progress.step} steps")
'''
ENTRY_POINTS = """
[clew.objectives]
squares = extra_things:Squares
[clew.towers]
bag = extra_things:Bag
[clew.metrics]
rows = extra_things:Rows
[clew.stages]
shout = extra_things:Shout
[clew.arrangements]
turned = extra_things:Turned
[clew.callbacks]
diary = extra_things:Diary
"""


def install(folder: Path, entry_points: str = ENTRY_POINTS, module: str = MODULE) -> Path:
    """The package as pip would lay it down."""
    info = folder / "extra_things-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "extra_things.py").write_text(module)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-things\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(install(tmp_path_factory.mktemp("site")))


@pytest.mark.slow
def test_they_are_listed_beside_clews_own(site: str, tmp_path: Path) -> None:
    for command, name, summary, paper in [
        ("objectives", "squares", "Squared distance of pairs.", "Squares: A Title of Our Own"),
        ("metrics", "rows", "How many rows there are.", ""),
        ("stages", "shout", "Drop anchors in capital letters.", ""),
    ]:
        done = clew(command, "--json", cwd=tmp_path, PYTHONPATH=site)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = {row["name"]: row for row in json.loads(done.stdout)}
        assert {key: rows[name][key] for key in ("name", "summary", "paper")} == {
            "name": name,
            "summary": summary,
            "paper": paper,
        }
        assert len(rows) > 1
        assert name not in {row["name"] for row in json.loads(clew(command, "--json", cwd=tmp_path).stdout)}


@pytest.mark.slow
def test_they_are_used(site: str, tmp_path: Path) -> None:
    pairs = [(f"question {n}" if n % 4 else f"QUESTION {n}", f"answer {n}") for n in range(32)]
    corpus = write_text_corpus(tmp_path / "pairs", pairs)

    curate = {"corpus": corpus, "out": "curated", "stages": ["shout"]}
    (tmp_path / "curate.yaml").write_text(yaml.safe_dump(curate))
    done = clew("curate", "curate.yaml", "--json", cwd=tmp_path, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr[-3000:]
    funnel = json.loads((tmp_path / "curated" / "funnel.json").read_text())
    (stage,) = (each for each in funnel["stages"] if each["stage"] == "shout")
    assert stage["dropped"] == {"capitals": 8}

    train = {
        "out": "model",
        "corpus": "curated",
        "model": {
            "embed_dim": 8,
            "towers": {"text": {"family": "bag"}},
            "views": {"anchor": "text", "positive": "text"},
        },
        "objective": {"name": "squares", "strength": 2.0},
        "batch_size": 8,
        "steps": 5,
        "workers": {"count": 0},
        "arrange": {"name": "turned", "by": "positive", "pool": 2},
        "callbacks": [{"name": "diary", "path": str(tmp_path / "diary.txt")}],
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    done = clew("train", "train.yaml", "--json", cwd=tmp_path, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["steps"] == 5
    assert (tmp_path / "diary.txt").read_text() == "5 steps"
    assert (tmp_path / "turned.txt").read_text().startswith("turned ")

    words = ["checkpoint=model", "corpora={all: pairs}", "metrics=[rows]", "out=eval"]
    done = clew("eval", *words, "--json", cwd=tmp_path, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr[-3000:]
    (figure,) = json.loads((tmp_path / "eval" / "eval.json").read_text())["corpora"]["all"]["metrics"]
    assert (figure["metric"], figure["value"]) == ("rows/count", 32)

    # Without the package the same configs are refused in one sentence.
    assert "No arrangement is called 'turned'" in sentence(clew("train", "train.yaml", cwd=tmp_path))
    assert "No tower is called 'bag'" in sentence(clew("train", "train.yaml", "arrange=null", cwd=tmp_path))


@pytest.mark.slow
def test_a_package_that_does_not_import_is_one_sentence(tmp_path: Path) -> None:
    site = install(tmp_path / "site", "[clew.objectives]\nbroken = extra_things:Missing\n")
    message = sentence(clew("objectives", cwd=tmp_path, PYTHONPATH=str(site)))
    assert "'broken' (extra_things:Missing) does not import" in message
