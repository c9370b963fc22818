"""The drop-in losses inside sentence-transformers' own trainer, on text pairs of the sample corpus.

sentence-transformers is right here, so the weights are those that its own losses train: in one process and in two.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.end_to_end.clew import ROOT
from tests.end_to_end.sentence_transformers_loop import Run, make_model, write_model
from tests.end_to_end.torchrun import Weights, assert_equal, movement, train

pytestmark = pytest.mark.slow
MODULE = "tests.end_to_end.sentence_transformers_loop"
PLAIN, CACHED = "MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"
FLOAT32 = 1e-6  # in which the trainer adds up what it logs
Trained = tuple[dict[str, Weights], Path]


def _both(name: str, loss: str, **fields: object) -> list[Run]:
    """The same run with the original and with the drop-in."""
    modules = {"original": "sentence_transformers.losses", "clew": "cl.losses"}
    return [Run(f"{who}-{name}", module, loss, **fields) for who, module in modules.items()]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A model's folder and the first text pairs of the sample corpus."""
    folder = tmp_path_factory.mktemp("start")
    pairs = pq.read_table(ROOT / "pipelines/sample/text/train.parquet", columns=["query", "positive"]).slice(0, 160)
    pq.write_table(pairs, folder / "pairs.parquet")
    texts = [text for column in pairs.columns for text in column.to_pylist()]
    write_model(folder / "model", texts)
    return str(folder / "model"), str(folder / "pairs.parquet")


@pytest.fixture(scope="module")
def alone(start: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Runs of one process, and the folder with their logs and model cards."""
    four = {"mini_batch_size": 4}
    runs = [
        *_both("plain", PLAIN, batch=16),
        *_both("cached", CACHED, arguments=four, batch=16),
        *_both("tokens", CACHED, arguments={"mini_batch_num_tokens": 40}, batch=16),
        *_both("accumulated", CACHED, arguments=four, accumulate=2),
        *_both("dropout", CACHED, arguments={"mini_batch_size": 8}, dropout=0.1),
        *_both("bf16", CACHED, arguments=four, precision="bf16"),
        *_both("matryoshka", PLAIN, matryoshka=[32, 16]),
        *_both("cached-matryoshka", CACHED, arguments=four, matryoshka=[32, 16]),
        *_both(
            "symmetric",
            PLAIN,
            arguments={"directions": ["query_to_doc", "doc_to_query"], "partition_mode": "per_direction"},
        ),
    ]
    out = tmp_path_factory.mktemp("alone") / "out"
    return train(MODULE, 1, runs, out, *start), out


@pytest.fixture(scope="module")
def together(start: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The same global batches on two processes."""
    gather = {"gather_across_devices": True}
    runs = [
        *_both("plain", PLAIN, arguments=gather),
        *_both("cached", CACHED, arguments={**gather, "mini_batch_size": 4}),
        *_both("cached-accumulated", CACHED, arguments={**gather, "mini_batch_size": 3}, accumulate=2),
        *_both("not-gathered", PLAIN),
    ]
    out = tmp_path_factory.mktemp("together") / "out"
    return train(MODULE, 2, runs, out, *start), out


def _logged(out: Path, name: str) -> list[float]:
    """The losses of training and of evaluation, in order."""
    records = json.loads((out / f"{name}.json").read_text())
    return [record.get("loss", record.get("eval_loss")) for record in records if {"loss", "eval_loss"} & record.keys()]


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "cached",
        "tokens",
        "accumulated",
        "dropout",  # the masks of the second pass are those of the first
        "matryoshka",
        "cached-matryoshka",
        "symmetric",
    ],
)
def test_one_process_equals_the_original(alone: Trained, start: tuple[str, str], name: str) -> None:
    weights, out = alone
    assert_equal(weights[f"clew-{name}"], weights[f"original-{name}"])
    assert _logged(out, f"clew-{name}") == pytest.approx(_logged(out, f"original-{name}"), rel=FLOAT32)
    begun = make_model(Run("start", "cl.losses", PLAIN), start[0]).state_dict()
    moved = movement(weights[f"clew-{name}"], begun)
    assert moved["0.model.embeddings.word_embeddings.weight"].abs().max() > 1e-4


@pytest.mark.parametrize("name", ["plain", "cached", "cached-accumulated", "not-gathered"])
def test_two_processes_equal_the_original(together: Trained, name: str) -> None:
    weights, out = together
    assert_equal(weights[f"clew-{name}"], weights[f"original-{name}"])
    assert _logged(out, f"clew-{name}") == pytest.approx(_logged(out, f"original-{name}"), rel=FLOAT32)


@pytest.mark.parametrize("name", ["plain", "cached"])
def test_gathering_on_two_processes_equals_one(alone: Trained, together: Trained, name: str) -> None:
    assert_equal(together[0][f"clew-{name}"], alone[0]["original-plain"])


def test_autocast_logs_the_losses_of_the_original(alone: Trained) -> None:
    found, expected = (_logged(alone[1], f"{who}-bf16") for who in ("clew", "original"))
    assert found == pytest.approx(expected, rel=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    ("name", "cited"), [("plain", "1807.03748"), ("symmetric", "2310.19923"), ("cached", "2101.06983")]
)
def test_model_card_names_settings_and_paper_as_the_original_does(alone: Trained, name: str, cited: str) -> None:
    ours, theirs = ((alone[1] / f"{who}-{name}" / "README.md").read_text() for who in ("clew", "original"))
    assert cited in ours
    assert cited in theirs

    def settings(card: str) -> str:
        return card.split("with these parameters:", 1)[1].split("```")[1]

    assert settings(ours) == settings(theirs)
