"""The drop-in losses inside open_clip's own training: its CSV reader, model, DDP and `train_one_epoch`, real images.

Where open_clip is right, the weights are those that its own loss trains. Where it is not, they are those of one process
that sees the whole batch at once, and the test shows by how much open_clip's differ.
"""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path

import pytest
import torch

from tests.end_to_end.clew import ROOT
from tests.end_to_end.open_clip_loop import Run, make_model
from tests.end_to_end.torchrun import Weights, assert_equal, movement, train

pytestmark = pytest.mark.slow
IMAGES = 64
MODULE = "tests.end_to_end.open_clip_loop"
ONE_STEP = {"optimizer": "sgd", "steps": 1}  # a step of plain SGD is the gradient


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first drawings of the sample corpus, as open_clip's CSV reader takes them."""
    folder = tmp_path_factory.mktemp("images")
    lines = ["filepath\ttitle"]
    with tarfile.open(ROOT / "pipelines/sample/train/emoji-google-00000.tar") as shard:
        members = {member.name: member for member in shard}
        for name in [name for name in members if name.endswith(".jpg") and "planted" not in name][:IMAGES]:
            image, text = shard.extractfile(members[name]), shard.extractfile(members[name[:-4] + ".txt"])
            assert image is not None
            assert text is not None
            (folder / name).write_bytes(image.read())
            lines.append(f"{folder / name}\t{text.read().decode()}")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "images.csv")


def _both(**fields: object) -> list[Run]:
    """The same run with open_clip's loss and with the drop-in."""
    name = str(fields.pop("name"))
    return [Run(f"{loss}-{name}", loss, **fields) for loss in ("open_clip", "clew")]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone(csv: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Weights], Path]:
    """Runs of one process, and the folder with what was logged."""
    runs = [
        *_both(name="clip", batch=16),
        *_both(name="siglip", kind="siglip", batch=16),
        *_both(name="clip-accumulated", batch=8, accumulate=2),
        *_both(name="siglip-accumulated", kind="siglip", batch=8, accumulate=2),
        *_both(name="accumulated-step", batch=32, accumulate=2, **ONE_STEP),
        *_both(name="amp_bf16", batch=16, precision="amp_bf16"),
        *_both(name="amp", batch=16, precision="amp"),
        Run("whole-step", "open_clip", batch=64, **ONE_STEP),  # type: ignore[arg-type]
    ]
    out = tmp_path_factory.mktemp("alone") / "out"
    return train(MODULE, 1, runs, out, csv), out


@pytest.fixture(scope="module")
def together(csv: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """The same global batches on two processes."""
    runs = [
        *_both(name="full", batch=8, gather="full"),
        *_both(name="local", batch=8, gather="local"),
        *_both(name="siglip", kind="siglip", batch=8),
        Run("clew-clip-accumulated", "clew", batch=4, accumulate=2),
        Run("clew-siglip-accumulated", "clew", "siglip", batch=4, accumulate=2),
        *_both(name="default-step", batch=32, **ONE_STEP),
        *_both(name="local-detached-step", batch=32, gather="local_detached", **ONE_STEP),
    ]
    return train(MODULE, 2, runs, tmp_path_factory.mktemp("together") / "out", csv)


def _start() -> Weights:
    return {name: value.detach() for name, value in make_model(Run("start", "clew")).state_dict().items()}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_one_process_equals_open_clips_loss(alone: tuple[dict[str, Weights], Path], kind: str) -> None:
    weights, out = alone
    assert_equal(weights[f"clew-{kind}"], weights[f"open_clip-{kind}"])
    logged = [json.loads((out / f"{loss}-{kind}.json").read_text()) for loss in ("clew", "open_clip")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-10)
    moved = movement(weights["clew-clip"], _start())
    assert min(float(value.abs().max()) for name, value in moved.items() if "bias" not in name) > 1e-4


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_accumulation_equals_the_whole_batch(alone: tuple[dict[str, Weights], Path], kind: str) -> None:
    """open_clip's loop gives the scale (and bias) accum_freq times their gradient: its weights drift from those of the
    whole batch. The drop-in with `accum_freq` keeps them.
    """
    weights, _ = alone
    assert_equal(weights[f"clew-{kind}-accumulated"], weights[f"open_clip-{kind}"])
    whole, drifted = weights[f"open_clip-{kind}"], weights[f"open_clip-{kind}-accumulated"]
    assert max(float((drifted[name] - whole[name]).abs().max()) for name in whole) > 1e-5


def test_accumulation_gives_the_scale_twice_its_gradient_in_open_clip(alone: tuple[dict[str, Weights], Path]) -> None:
    weights, _ = alone
    whole = movement(weights["whole-step"], _start())
    theirs = movement(weights["open_clip-accumulated-step"], _start())
    torch.testing.assert_close(theirs["logit_scale"], 2 * whole["logit_scale"], rtol=1e-9, atol=0)
    assert_equal(weights["clew-accumulated-step"], weights["whole-step"])


@pytest.mark.parametrize("gather", ["full", "local"])
def test_two_processes_equal_open_clip_with_gradients_and_one_process(
    alone: tuple[dict[str, Weights], Path], together: dict[str, Weights], gather: str
) -> None:
    assert_equal(together[f"clew-{gather}"], together[f"open_clip-{gather}"])
    assert_equal(together[f"clew-{gather}"], alone[0]["open_clip-clip"])


def test_two_processes_of_the_sigmoid_loss_equal_open_clip_and_one_process(
    alone: tuple[dict[str, Weights], Path], together: dict[str, Weights]
) -> None:
    assert_equal(together["clew-siglip"], together["open_clip-siglip"])
    assert_equal(together["clew-siglip"], alone[0]["open_clip-siglip"])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_processes_that_accumulate_equal_one_process_and_the_whole_batch(
    alone: tuple[dict[str, Weights], Path], together: dict[str, Weights], kind: str
) -> None:
    assert_equal(together[f"clew-{kind}-accumulated"], alone[0][f"open_clip-{kind}"])


def test_open_clips_default_on_two_processes_moves_the_encoders_half_as_far(
    alone: tuple[dict[str, Weights], Path], together: dict[str, Weights]
) -> None:
    """Its default gathers without gradient; the drop-in, with the same arguments, equals one process."""
    whole = movement(alone[0]["whole-step"], _start())
    theirs = movement(together["open_clip-default-step"], _start())
    for name, value in whole.items():
        share = 1.0 if name == "logit_scale" else 0.5
        torch.testing.assert_close(theirs[name], share * value, rtol=1e-8, atol=1e-12)
    assert_equal(together["clew-default-step"], alone[0]["whole-step"])


def test_open_clips_local_loss_without_gradients_moves_elsewhere(
    alone: tuple[dict[str, Weights], Path], together: dict[str, Weights]
) -> None:
    """`local_loss` alone: no factor turns its step into that of one process; the drop-in's is that step."""
    whole = movement(alone[0]["whole-step"], _start())
    theirs = movement(together["open_clip-local-detached-step"], _start())
    a, b = (torch.cat([moved[name].flatten() for name in whole if name != "logit_scale"]) for moved in (theirs, whole))
    residual = (a - (a @ b) / (b @ b) * b).norm() / a.norm()
    assert residual > 0.01
    assert_equal(together["clew-local-detached-step"], alone[0]["whole-step"])


@pytest.mark.parametrize("precision", ["amp_bf16", "amp"])
def test_half_types_log_the_losses_of_open_clip(alone: tuple[dict[str, Weights], Path], precision: str) -> None:
    """To the rounding of the half type; `amp` runs a gradient scaler, which skips and scales steps alike."""
    weights, out = alone
    kind = torch.bfloat16 if precision == "amp_bf16" else torch.float16
    logged = [json.loads((out / f"{loss}-{precision}.json").read_text()) for loss in ("clew", "open_clip")]
    assert logged[0] == pytest.approx(logged[1], rel=torch.finfo(kind).eps)
    assert all(math.isfinite(float(value.sum())) for value in weights[f"clew-{precision}"].values())
