"""Runs in one process: learning, resuming, and what a folder that holds a run allows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import yaml

from cl.batches.labels import code_of
from cl.config import Config, parse_config
from cl.encoders import EncoderModel, load_checkpoint_model
from cl.errors import ClewError, ConfigError, DataError
from cl.pairs import Clock, Pairs
from cl.training.callbacks import CALLBACKS, Callback, Progress
from cl.training.config import TrainConfig
from cl.training.finite import DivergedError
from cl.training.metrics import MetricsWriter, read_metrics
from cl.training.run import train
from tests.training_corpus import tiny_run, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "squares")


def config(corpus: str, out: Path, **fields: Any) -> TrainConfig:
    return parse_config(TrainConfig, tiny_run(corpus, out, **fields), "test")


def curve(out: Path) -> list[tuple[int, int, float, float, float]]:
    return [(r["step"], r["samples"], r["loss"], r["lr"], r["grad_norm"]) for r in read_metrics(out / "metrics.jsonl")]


class Killed(BaseException):
    """As sudden as a kill: nothing catches it."""


@CALLBACKS.register("die_at", "test: end the process's run at a step")
class DieAt(Callback):
    def on_record(self, progress: Progress, record: dict[str, Any]) -> None:
        if progress.step == DIE_AT:
            raise Killed


DIE_AT = 13


def test_learns_and_explains_itself(corpus: str, tmp_path: Path) -> None:
    result = train(config(corpus, tmp_path / "run", steps=60, log_every=10))
    assert result.steps == 60
    assert result.loss_first is not None
    assert result.loss_last is not None
    assert result.loss_last < 0.6 * result.loss_first
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 10, 20, 30, 40, 50, 60]
    expected = {
        "loss",
        "logit_scale",
        "lr",
        "grad_norm",
        "samples_per_second",
        "data_wait",
        "seconds",
        "epoch",
        "samples",
    }
    assert expected <= records[-1].keys()
    # 90 samples in steps of 16: 6 steps an epoch, the last of them with 10 samples.
    assert (records[1]["epoch"], records[1]["samples"]) == (1, 90 + 4 * 16)
    assert result.samples == 10 * 90
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_a_card_says_what_was_trained_on_what(corpus: str, tmp_path: Path) -> None:
    cfg = config(corpus, tmp_path / "run", steps=3)
    result = train(cfg)
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text()
    head, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(head) == {"library_name": "clew", "tags": ["contrastive", "image-text"]}
    assert body.startswith("\n# run\n")
    assert "- `image`: open_clip, vision" in body
    rows = dict(re.findall(r"^\| (.+?) \| (.*) \|$", body, re.MULTILINE))
    assert (rows["objective"], rows["optimizer steps"], rows["samples"]) == ("infonce", "3", str(result.samples))
    assert rows["torch"] == torch.__version__.partition("+")[0]
    assert f"- `{corpus}`: 90 image-text samples" in body
    assert (
        parse_config(TrainConfig, yaml.safe_load(body.partition("```yaml\n")[2].removesuffix("```\n")), "card") == cfg
    )


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_killed_and_resumed_equals_uninterrupted(corpus: str, tmp_path: Path, precision: str) -> None:
    """Bitwise, with dropout: order, augmentation, dropout, optimizer and schedule all go on where they were."""
    model = tiny_run(corpus, tmp_path)["model"]
    model = json.loads(json.dumps(model))
    model["towers"]["image"]["config"]["patch_dropout"] = 0.5
    whole = config(corpus, tmp_path / "whole", precision=precision, model=model)
    train(whole)
    cut = config(corpus, tmp_path / "cut", precision=precision, model=model, callbacks=[{"name": "die_at"}])
    with pytest.raises(Killed):
        train(cut)
    assert curve(tmp_path / "cut")[-1][0] == DIE_AT - 1
    result = train(cut.model_copy(update={"callbacks": []}), resume=True)
    assert result.resumed_from == 10
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


MANY_VIEWS: dict[str, Any] = {
    "image": "image",
    "strong": {"tower": "image", "of": "image", "augment": "simclr"},
    "text": "text",
}


def self_distilled(out: Path) -> dict[str, Any]:
    """Fields of a run whose loss compares texts with pictures, and a strong view with an average's view of the weak."""
    terms = {
        "clip": {"objective": {"name": "infonce", "views": ["image", "text"]}},
        "self": {"objective": {"name": "infonce", "views": ["strong", "image_ema"]}},
    }
    model = json.loads(json.dumps(tiny_run("", out)["model"])) | {"views": MANY_VIEWS}
    model["towers"]["image"]["config"]["patch_dropout"] = 0.5
    return {
        "model": model,
        "objective": {"name": "sum", "terms": terms},
        "teachers": {"ema": {"kind": "ema", "views": ["image"], "momentum": 0.8}},
    }


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_teacher_goes_on_where_it_was(corpus: str, tmp_path: Path, micro_batch: int | None) -> None:
    """Killed and resumed equals uninterrupted, bitwise: augmented views, dropout, and an average that follows."""
    fields = self_distilled(tmp_path) | {"micro_batch": micro_batch}
    train(config(corpus, tmp_path / "whole", **fields))
    cut = config(corpus, tmp_path / "cut", **fields, callbacks=[{"name": "die_at"}])
    with pytest.raises(Killed):
        train(cut)
    result = train(cut.model_copy(update={"callbacks": []}), resume=True)
    assert result.resumed_from == 10
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    whole, resumed = (
        load_checkpoint_model(tmp_path / run / "checkpoints" / "step-00000020" / "teachers" / "ema")[0].state_dict()
        for run in ("whole", "cut")
    )
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    towers = load_checkpoint_model(tmp_path / "whole")[0].state_dict()
    assert not any(torch.equal(value, towers[name]) for name, value in whole.items() if value.numel() > 1)


def test_a_seed_fixes_the_weights_of_an_objective_too(corpus: str, tmp_path: Path) -> None:
    def first_loss(run: str, seed: int) -> float:
        torch.rand(7)  # whatever was drawn before
        heads = {"name": "swav", "prototypes": 8, "projector": [8]}
        train(config(corpus, tmp_path / run, seed=seed, steps=1, objective=heads))
        return read_metrics(tmp_path / run / "metrics.jsonl")[0]["loss"]

    assert first_loss("one", 0) == first_loss("two", 0) != first_loss("other", 1)


SEEN: list[Pairs] = []


@CALLBACKS.register("see_pairs", "test: keep what the objective is given")
class SeePairs(Callback):
    def on_start(self, progress: Progress) -> None:
        SEEN.clear()
        progress.objective.register_forward_pre_hook(lambda module, inputs: SEEN.append(inputs[0]))


def test_what_an_objective_sees(corpus: str, tmp_path: Path) -> None:
    """Views of teachers, labels and the clock, whole and cached."""
    fields = self_distilled(tmp_path) | {"steps": 8, "labels": {"source": "source", "bytes": "length"}}
    for run, micro_batch in (("whole", None), ("cached", 5)):
        train(config(corpus, tmp_path / run, **fields, micro_batch=micro_batch, callbacks=[{"name": "see_pairs"}]))
        assert [list(pairs.views) for pairs in SEEN] == [["image", "strong", "text", "image_ema"]] * 8
        # 90 samples in steps of 16: 6 steps an epoch, so that 8 steps are in two epochs.
        assert [pairs.clock for pairs in SEEN] == [Clock(step, 8, step // 6, 2) for step in range(8)]
        assert not SEEN[3].views["image_ema"].requires_grad
        weight = SEEN[5].weights()
        assert weight.sum() == 10
        codes = SEEN[5].label("source")
        assert (codes[weight > 0] == code_of("squares")).all()
        assert not codes[weight == 0].any()
        assert (SEEN[5].label("bytes")[weight > 0] > 100).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": {"x": "colour"}}, "labels.x names the column 'colour'"),
        ({"teachers": {"t": {"kind": "frozen", "weights": "/nowhere"}}}, "teachers.t: weights /nowhere do not exist"),
    ],
)
def test_labels_and_teachers_are_checked_before_anything_is_written(
    corpus: str, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ClewError, match=words):
        train(config(corpus, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_damaged_checkpoint_costs_steps_not_the_run(corpus: str, tmp_path: Path) -> None:
    train(config(corpus, tmp_path / "whole"))
    train(config(corpus, tmp_path / "run", steps=10, schedule={"kind": "constant"}))
    weights = tmp_path / "run" / "checkpoints" / "step-00000010" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = train(config(corpus, tmp_path / "run", steps=12, schedule={"kind": "constant"}), resume=True)
    assert (result.resumed_from, result.steps) == (5, 12)
    assert [record[0] for record in curve(tmp_path / "run")] == list(range(1, 13))


def test_finished_run_is_returned_and_another_is_refused(corpus: str, tmp_path: Path) -> None:
    run = config(corpus, tmp_path / "run", steps=6)
    result = train(run)
    before = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert train(run) == result
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"optimizer.lr=0.003, but this config has optimizer.lr=0.1"):
        train(config(corpus, tmp_path / "run", steps=6, optimizer={"lr": 0.1}), resume=True)
    with pytest.raises(ConfigError, match="--resume"):
        train(config(corpus, tmp_path / "run", steps=8))
    longer = train(config(corpus, tmp_path / "run", steps=8, log_every=2), resume=True)
    assert (longer.steps, longer.resumed_from) == (8, 6)


def test_foreign_checkpoints_are_not_taken_for_own(corpus: str, tmp_path: Path) -> None:
    train(config(corpus, tmp_path / "one", steps=5))
    place = {"every_steps": 5, "path": str(tmp_path / "one" / "checkpoints")}
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        train(config(corpus, tmp_path / "two", steps=5, checkpoint=place))


def test_other_samples_are_refused_on_resume(corpus: str, tmp_path: Path) -> None:
    train(config(corpus, tmp_path / "run", steps=5))
    other = write_corpus(tmp_path / "other", samples=50)
    with pytest.raises(DataError, match="order of samples"):
        train(config(other, tmp_path / "run", steps=9), resume=True)


def test_diverged_run_names_step_and_samples(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as caught:
        train(config(corpus, tmp_path / "run", callbacks=[{"name": "poison"}]))
    message = str(caught.value)
    assert "step 4" in message
    assert "worker 0: 16 of 16 samples, ids " in message


class NanConfig(Config):
    steps: list[int]


@CALLBACKS.register("nan_at", "test: gradients that are no numbers at some steps")
class NanAt(Callback):
    """The gradient of one tower is NaN."""

    Config = NanConfig

    def on_start(self, progress: Progress) -> None:
        self.step = progress.step + 1
        assert isinstance(progress.model, EncoderModel)
        next(progress.model.towers["image"].parameters()).register_hook(self.spoil)

    def spoil(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.nan if self.step in self.config.steps else gradient

    def on_record(self, progress: Progress, record: dict[str, Any]) -> None:
        self.step = progress.step + 1


def test_a_step_without_a_number_is_left_out(corpus: str, tmp_path: Path) -> None:
    """Its samples are listed, no weight moves, the rate comes back slowly, also in a run that goes on from there."""
    fields = {
        "callbacks": [{"name": "nan_at", "steps": [4, 5]}],
        "not_finite": {"action": "skip", "limit": 2, "backoff": 0.25, "backoff_steps": 3},
        "schedule": {"kind": "constant"},
        "checkpoint": {"every_steps": 1, "keep_last": 20},
    }
    train(config(corpus, tmp_path / "run", steps=10, **fields))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    peak = records[0]["lr"]
    parts = [record["lr"] / peak for record in records]
    assert parts == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.75, 1, 1, 1])
    assert [record.get("skipped", 0) for record in records] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    weights = [(tmp_path / f"run/checkpoints/step-{n:08d}/model.safetensors").read_bytes() for n in (3, 4, 5, 6)]
    assert weights[0] == weights[1] == weights[2] != weights[3]
    listed = orjson.loads((tmp_path / "run" / "skipped" / "step-00000004.rank-0.json").read_bytes())
    assert (len(listed["ids"]), listed["grad_norm"], listed["not_finite"]) == (16, "nan", [])

    train(config(corpus, tmp_path / "resumed", steps=5, **fields))
    train(config(corpus, tmp_path / "resumed", steps=10, **fields), resume=True)
    again = read_metrics(tmp_path / "resumed" / "metrics.jsonl")
    for key in ("loss", "lr"):
        assert [r[key] for r in again[5:]] == [r[key] for r in records[5:]]


def test_too_many_in_a_row_end_the_run(corpus: str, tmp_path: Path) -> None:
    fields = {"callbacks": [{"name": "nan_at", "steps": [2, 3, 4]}], "not_finite": {"action": "skip", "limit": 2}}
    with pytest.raises(DivergedError, match="at step 4"):
        train(config(corpus, tmp_path / "run", **fields))


@CALLBACKS.register("poison", "test: put a NaN into the weights after step 3")
class Poison(Callback):
    def on_record(self, progress: Progress, record: dict[str, Any]) -> None:
        if progress.step == 3:
            assert isinstance(progress.model, EncoderModel)
            with torch.no_grad():
                next(progress.model.towers["image"].parameters()).fill_(torch.nan)


def test_callback_stops_a_run_with_a_checkpoint(corpus: str, tmp_path: Path) -> None:
    stop = {"name": "stop_at_loss", "loss": 2.5}
    result = train(config(corpus, tmp_path / "run", steps=200, callbacks=[stop]))
    assert result.steps < 200
    assert result.loss_last is not None
    assert result.loss_last <= 2.5
    assert result.checkpoint.endswith(f"step-{result.steps:08d}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"corpus": "/nowhere/at/all"}, "Corpus /nowhere/at/all does not exist"),
        ({"callbacks": [{"name": "stop_at_los"}]}, "Did you mean 'stop_at_loss'"),
        ({"callbacks": [{"name": "stop_at_loss"}]}, "'loss' is required"),
    ],
)
def test_refused_before_anything_is_written(corpus: str, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    change = dict(change)
    with pytest.raises(ClewError, match=words):
        train(config(change.pop("corpus", corpus), tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_records_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    with MetricsWriter(str(tmp_path), 0) as writer:
        for step in range(1, 8):
            writer.write({"step": step, "loss": 1.0 / step})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 8, "lo')  # a writer killed in mid-line
    with MetricsWriter(str(tmp_path), 5) as writer:
        writer.write({"step": 6, "loss": 0.5})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert _board_steps(tmp_path / "tensorboard") == [1, 2, 3, 4, 5, 6]


def _board_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    return [event.step for event in board.Scalars("train/loss")]


def test_weights_of_a_finished_run_are_a_start(corpus: str, tmp_path: Path) -> None:
    train(config(corpus, tmp_path / "first", steps=10))
    model = tiny_run(corpus, tmp_path)["model"] | {"weights": str(tmp_path / "first")}
    shutil.rmtree(tmp_path / "first" / "tensorboard")
    second = train(config(corpus, tmp_path / "second", steps=5, model=model))
    fresh = train(config(corpus, tmp_path / "fresh", steps=5))
    assert second.loss_first is not None
    assert fresh.loss_first is not None
    assert second.loss_first < fresh.loss_first
