"""Training speed: Clew beside open_clip's own loop and a bare loop, for the same model, batch, precision and optimizer.

    python -m tests.benchmarks.bench_train [--batch 128] [--steps 8] [--rounds 3] [--precision fp32] [--out result.json]

- open_clip: its `train_one_epoch`, with its CLIP model, ClipLoss and AdamW as its `main` builds it.
- bare: the same model and loss in the shortest loop there is, fused AdamW: what the hardware gives.
- Clew step: Clew's model, objective, clipping and optimizer on the same batches in memory.
- Clew run: `clew train` in one process from a corpus on disk: reading, decoding, augmentation, metrics included.

The first three read the same batches, made before the clock starts. Rounds are interleaved, so that whatever else the
machine does falls on all of them; the table shows the median round and its ratio to open_clip.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from open_clip_train.train import train_one_epoch

from cl.batches.batch import Batch
from cl.config import parse_config
from cl.encoders import build_model
from cl.engine.collectives import Workers
from cl.objectives import build_objective
from cl.training.config import Precision, TrainConfig
from cl.training.finite import Guard, gradient_norm
from cl.training.optimizer import build_optimizer
from cl.training.precision import resolve
from cl.training.run import train
from cl.training.step import TrainStep
from tests.training_corpus import write_corpus

VISION = {"image_size": 64, "patch_size": 8, "width": 192, "head_width": 48, "layers": 6, "mlp_ratio": 4.0}
TEXT = {"vocab_size": 49408, "context_length": 32, "width": 192, "heads": 4, "layers": 4}
EMBED = 256
CPU = torch.device("cpu")


def config(corpus: str, out: str, batch: int, steps: int, precision: Precision) -> TrainConfig:
    """Clew's config of the run that is compared."""
    towers = {
        "image": {"family": "open_clip", "part": "vision", "config": VISION},
        "text": {"family": "open_clip", "part": "text", "config": TEXT},
    }
    fields: dict[str, Any] = {
        "out": out,
        "corpus": corpus,
        "model": {"embed_dim": EMBED, "towers": towers, "views": {"image": "image", "text": "text"}},
        "batch_size": batch,
        "steps": steps,
        "precision": precision,
        "clip_norm": 1.0,
        "workers": {"count": 0},
        "loader": {"threads": 1},
        "checkpoint": {"every_steps": 10**6},
        "log_every": steps,
    }
    return parse_config(TrainConfig, fields, "benchmark")


def batches(batch: int, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """uint8 images [B, 3, 64, 64] and token ids [B, 32] whose largest id ends the text."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps):
        images = torch.randint(0, 256, (batch, 3, 64, 64), generator=generator, dtype=torch.uint8)
        texts = torch.randint(1, 49000, (batch, 32), generator=generator)
        texts[:, 0], texts[:, -1] = 49406, 49407
        made.append((images, texts))
    return made


class _OpenClipData:
    """What `train_one_epoch` takes for a data loader: float images, as open_clip's transforms give them."""

    def __init__(self, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.items = [(images.float() / 127.5 - 1, texts) for images, texts in data]
        self.num_batches, self.num_samples = len(data), sum(len(texts) for _, texts in data)
        self.dataloader = self

    def __iter__(self) -> Any:
        return iter(self.items)

    def set_epoch(self, epoch: int) -> None:
        pass


def open_clip_loop(data: list[tuple[torch.Tensor, torch.Tensor]], precision: Precision) -> Callable[[], None]:
    """open_clip's own epoch."""
    model = CLIP(EMBED, VISION, TEXT, output_dict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    args = Namespace(
        device="cpu",
        precision="amp_bf16" if precision == "bf16" else "fp32",
        accum_freq=1,
        distill=False,
        skip_scheduler=True,
        grad_clip_norm=1.0,
        horovod=False,
        log_every_n_steps=10**6,
        batch_size=len(data[0][1]),
        world_size=1,
        rank=0,
        local_rank=0,
        distributed=False,
        wandb=False,
        save_logs=False,
    )
    reader = {"train": _OpenClipData(data)}
    loss = open_clip.ClipLoss()
    return lambda: train_one_epoch(model, reader, loss, 0, optimizer, None, None, None, args)


def bare_loop(data: list[tuple[torch.Tensor, torch.Tensor]], precision: Precision) -> Callable[[], None]:
    """The shortest loop with open_clip's model and loss."""
    model = CLIP(EMBED, VISION, TEXT, output_dict=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
    loss = open_clip.ClipLoss()
    items = _OpenClipData(data).items

    def run() -> None:
        for images, texts in items:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out = model(images, texts)
                value = loss(**out)
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def clew_step(
    data: list[tuple[torch.Tensor, torch.Tensor]], precision: Precision, cfg: TrainConfig
) -> Callable[[], None]:
    """Clew's step, all of it, on batches in memory."""
    step = TrainStep(build_model(cfg.model), build_objective(cfg.objective), Workers(), precision).train()
    optimizer = build_optimizer(cfg.optimizer, step)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    guard = Guard(cfg.not_finite, cfg.out, Workers())
    made = []
    for number, (images, texts) in enumerate(data):
        rows = torch.arange(len(texts))
        views: dict[str, Any] = {"image": images, "text": texts}
        made.append(Batch(views, torch.stack([rows, rows], 1), rows, torch.ones(len(rows)), 0, number, 0))

    def run() -> None:
        for number, batch in enumerate(made):
            output = step(batch)
            output.loss.backward()
            norm = gradient_norm(parameters, cfg.clip_norm)
            assert guard.accept(output.loss.item(), norm.item(), number, output.finite, batch.ids)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step.objective.clamp_()

    return run


def measure(batch: int, steps: int, rounds: int, precision: Precision) -> dict[str, list[float]]:
    """Samples a second of each loop in each round; the first round warms up and is not counted."""
    data = batches(batch, steps)
    speeds: dict[str, list[float]] = {"open_clip": [], "bare": [], "Clew step": [], "Clew run": []}
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus", samples=2 * batch, row_group=64)
        cfg = config(corpus, f"{folder}/step", batch, steps, precision)
        loops = {
            "open_clip": open_clip_loop(data, precision),
            "bare": bare_loop(data, precision),
            "Clew step": clew_step(data, precision, cfg),
        }
        for number in range(rounds + 1):
            for name, loop in loops.items():
                start = time.perf_counter()
                loop()
                if number:
                    speeds[name].append(batch * steps / (time.perf_counter() - start))
            if number:
                result = train(config(corpus, f"{folder}/run-{number}", batch, steps, precision))
                speeds["Clew run"].append(batch * steps / result.seconds)
    return speeds


def main() -> None:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="samples a step")
    parser.add_argument("--steps", type=int, default=8, help="steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="where to write JSON")
    options = SimpleNamespace(**vars(parser.parse_args()))
    torch.set_num_threads(options.threads)
    precision = resolve(options.precision, CPU)
    speeds = measure(options.batch, options.steps, options.rounds, precision)
    base = statistics.median(speeds["open_clip"])
    print(f"{'loop':<12}{'samples/s':>12}{'lowest':>10}{'highest':>10}{'x open_clip':>14}")
    for name, values in speeds.items():
        middle = statistics.median(values)
        print(f"{name:<12}{middle:>12.1f}{min(values):>10.1f}{max(values):>10.1f}{middle / base:>14.2f}")
    if options.out is not None:
        result = {"batch": options.batch, "steps": options.steps, "precision": precision, "samples_per_second": speeds}
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
