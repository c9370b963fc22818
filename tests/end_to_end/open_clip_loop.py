"""open_clip's own training, with the loss that a run names: its reader of a CSV file, model, DDP, `train_one_epoch`.

    torchrun --nproc-per-node W -m tests.end_to_end.open_clip_loop RUNS.json DATA.csv OUT

One process trains every run of RUNS.json in turn and rank 0 writes OUT/NAME.safetensors (the weights) and
OUT/NAME.json (what the loop logged as its loss, step by step).
"""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Run:
    """One training: `steps` times `batch` samples a process and accumulated part."""

    name: str
    loss: str  # open_clip or clew
    kind: str = "clip"  # or siglip
    batch: int = 8
    steps: int = 4
    accumulate: int = 1
    gather: str = "none"  # open_clip's way: none (its default), full, local, local_detached
    precision: str = "fp64"  # fp64, fp32, amp_bf16, amp (half types with a gradient scaler)
    optimizer: str = "adamw"  # as open_clip's main makes it, with clipping; or sgd, without


class Log:
    """What the loop takes for a TensorBoard writer."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.values.setdefault(name, []).append(float(value))


def make_loss(run: Run) -> nn.Module:
    """The loss as open_clip's factory makes it; the drop-in takes the same arguments and `accum_freq`."""
    import open_clip

    import cl.losses

    where = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    more = {"accum_freq": run.accumulate} if run.loss == "clew" else {}
    losses: Any = cl.losses if run.loss == "clew" else open_clip.loss
    if run.kind == "siglip":
        return losses.SigLipLoss(**where, **more)
    gather = {
        "local_loss": run.gather in ("local", "local_detached"),
        "gather_with_grad": run.gather in ("full", "local"),
    }
    return losses.ClipLoss(**gather, cache_labels=True, **where, **more)


def make_model(run: Run) -> nn.Module:
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2, "mlp_ratio": 2.0}
    text = {"vocab_size": 49408, "context_length": 16, "width": 32, "heads": 2, "layers": 2}
    start = {"init_logit_scale": math.log(10), "init_logit_bias": -10} if run.kind == "siglip" else {}
    model = CLIP(16, vision, text, output_dict=True, **start)
    return model.double() if run.precision == "fp64" else model


def train(run: Run, csv: str) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and logged losses after `run.steps` optimizer steps."""
    import open_clip
    from open_clip.transform import image_transform
    from open_clip_train.data import get_csv_dataset
    from open_clip_train.train import train_one_epoch

    args = Namespace(
        device="cpu", distributed=True, horovod=False, rank=dist.get_rank(), local_rank=dist.get_rank(),
        world_size=dist.get_world_size(), precision="fp32" if run.precision == "fp64" else run.precision,
        accum_freq=run.accumulate, batch_size=run.batch, workers=0, distill=False, skip_scheduler=True,
        grad_clip_norm=1.0 if run.optimizer == "adamw" else None, log_every_n_steps=1, wandb=False, save_logs=False,
        train_data=csv, csv_img_key="filepath", csv_caption_key="title", csv_separator="\t",
    )  # fmt: skip
    resize = image_transform(32, is_train=False)
    kind = torch.float64 if run.precision == "fp64" else torch.float32
    data = get_csv_dataset(
        args,
        lambda image: resize(image).to(kind),
        is_train=True,
        tokenizer=open_clip.SimpleTokenizer(context_length=16),
    )
    torch.manual_seed(1)
    model = nn.parallel.DistributedDataParallel(make_model(run))
    if run.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu") if run.precision == "amp" else None
    log = Log()
    train_one_epoch(model, {"train": data}, make_loss(run), 0, optimizer, scaler, None, None, args, tb_writer=log)
    weights = {name: value.detach().contiguous() for name, value in model.module.state_dict().items()}
    return weights, log.values.get("train/loss", [])  # only rank 0 logs


def main(runs: str, csv: str, out: str) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for fields in json.loads(Path(runs).read_text()):
        run = Run(**fields)
        weights, losses = train(run, csv)
        if dist.get_rank() == 0:
            assert len(losses) == run.steps
            save_file(weights, f"{out}/{run.name}.safetensors", {"run": json.dumps(asdict(run))})
            Path(f"{out}/{run.name}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
