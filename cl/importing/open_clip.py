"""open_clip's command line (`python -m open_clip_train.main ...`), read by open_clip's own parser."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
from collections.abc import Sequence
from typing import Any

from cl.errors import ConfigError
from cl.importing import Imported, Note

HALF = "fp16 is not offered: bf16 has the range of fp32 and needs no loss scaling"
PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "amp_bf16": "bf16", "amp_bfloat16": "bf16", "pure_bf16": "bf16"}
EXACT = "not needed: gradients are those of the global batch, however candidates are exchanged"
# Flags without a field; those of evaluation and of logging go to other commands.
WITHOUT = {
    "local_loss": EXACT,
    "gather_with_grad": EXACT,
    "loss_dist_impl": EXACT,
    "horovod": "not needed: workers are started by Ray Train or torchrun",
    "dist_url": "not needed: workers are started by Ray Train or torchrun",
    "dist_backend": "chosen by device: nccl or gloo",
    "ddp_static_graph": "not needed; it would exclude gradient caching",
    "no_set_device_rank": "not needed: Ray Train assigns devices",
    "device": "the GPUs that workers get (workers.gpus)",
    "resume": "give --resume to clew train",
    "val_data": "clew eval measures checkpoints of the run",
    "val_num_samples": "clew eval measures checkpoints of the run",
    "val_frequency": "clew eval measures checkpoints of the run",
    "imagenet_val": "clew eval, metric zero_shot",
    "imagenet_v2": "clew eval, metric zero_shot",
    "zeroshot_frequency": "clew eval measures checkpoints of the run",
    "report_to": "metrics.jsonl and TensorBoard files are always written",
    "train_num_samples": "a corpus knows its size; an epoch is one pass over it",
    "dataset_type": "clew ingest finds the format of shards and tables",
    "dataset_resampled": "each sample is seen once an epoch; mixture draws corpora with other weights",
    "csv_separator": "clew download reads csv and tsv tables of URLs",
    "csv_img_key": "clew ingest and clew download, columns",
    "csv_caption_key": "clew ingest and clew download, columns",
    "save_frequency": "checkpoint.every_steps counts steps, not epochs",
    "save_most_recent": "checkpoint.keep_last",
    "delete_previous_checkpoint": "checkpoint.keep_last",
    "log_local": "the first worker writes what a run writes",
    "remote_sync": "checkpoint.path may be any fsspec URL",
    "remote_sync_frequency": "checkpoint.path may be any fsspec URL",
    "remote_sync_protocol": "checkpoint.path may be any fsspec URL",
    "use_bn_sync": "no equivalent: batch norms see a worker's samples",
    "lock_image_freeze_bn_stats": "a tower that is locked as a whole runs in evaluation mode",
    "lock_text_freeze_layer_norm": "a tower that is locked as a whole runs in evaluation mode",
    "train_data_upsampling_factors": "mixture.weights, one a corpus",
    "force_image_size": "model.towers.image.config: {image_size: N}",
    "force_context_length": "model.towers.text.config: {context_length: N}",
    "force_quick_gelu": "quick_gelu: true in both towers",
    "image_mean": "model.towers.image.mean",
    "image_std": "model.towers.image.std",
    "aug_cfg": "model.views.image: {tower: image, augmentation: ...}; clew augmentations lists them",
    "distill_model": "teachers, kind frozen, and an objective of distillation",
    "distill_pretrained": "teachers, kind frozen, and an objective of distillation",
    "coca_caption_loss_weight": "the recipe coca: clew train coca --print-config",
    "coca_contrastive_loss_weight": "the recipe coca: clew train coca --print-config",
}


def import_open_clip(words: Sequence[str], gpus: int = 1) -> Imported:
    """Translate open_clip's flags.

    Args:
        words: the command line behind `open_clip_train.main`.
        gpus: processes that it was started on; open_clip's batch size is that of one.

    Raises:
        ConfigError: flags that open_clip does not take, a model it does not have.
    """
    import open_clip

    given, default = _parse(words), _parse([])
    shape = open_clip.get_model_config(given.model)
    if shape is None:
        near = difflib.get_close_matches(given.model, open_clip.list_models(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"open_clip has no model {given.model!r}.{hint}")
    notes: list[Note] = []
    config = {
        "out": f"{given.logs.rstrip('/')}/{given.name or 'run'}",
        "corpus": "runs/corpus",
        "seed": given.seed,
        "model": _model(given, shape["embed_dim"]),
        "objective": {"name": "siglip", "temperature": 0.1, "bias": -10.0} if given.siglip else {"name": "infonce"},
        "batch_size": given.batch_size * given.accum_freq * gpus,
        **({"micro_batch": given.batch_size} if given.accum_freq > 1 else {}),
        "epochs": given.epochs,
        "optimizer": _optimizer(given, notes),
        "schedule": _schedule(given, notes),
        "precision": PRECISIONS.get(given.precision, "bf16"),
        "clip_norm": given.grad_clip_norm,
        "workers": {"count": gpus},
        "loader": {"threads": max(given.workers, 1)},
        "log_every": given.log_every_n_steps,
    }
    locked = _locked(given)
    if locked:
        config["locked"] = locked
    parallel = {"activation_checkpointing": given.grad_checkpointing, "compile": given.torchcompile}
    if any(parallel.values()):
        config["parallel"] = {name: True for name, wanted in parallel.items() if wanted}
    if given.train_data:
        notes.append(Note(f"--train-data {given.train_data}", "clew ingest makes the corpus of it: runs/corpus here"))
    if given.precision not in PRECISIONS:
        notes.append(Note(f"--precision {given.precision}", HALF))
    if given.accum_freq > 1:
        notes.append(Note(f"--accum-freq {given.accum_freq}", "gradient caching: batch_size counts all of it"))
    if given.pretrained and not given.pretrained.endswith(".safetensors"):
        notes.append(Note(f"--pretrained {given.pretrained}", "model.weights takes an open_clip .safetensors file"))
    return Imported(config, notes + _left_out(given, default))


def _parse(words: Sequence[str]) -> argparse.Namespace:
    from open_clip_train.params import parse_args

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse_args(list(words))
    except SystemExit as stop:
        reason = said.getvalue().strip().splitlines() or ["the flags cannot be read"]
        raise ConfigError(f"open_clip does not take these flags: {reason[-1].partition('error: ')[2]}.") from stop


def _model(given: argparse.Namespace, embed_dim: int) -> dict[str, Any]:
    image: dict[str, Any] = {"family": "open_clip", "part": "vision", "name": given.model}
    if given.force_patch_dropout is not None:
        image["patch_dropout"] = given.force_patch_dropout
    text = {"family": "open_clip", "part": "text", "name": given.model}
    model = {"embed_dim": embed_dim, "towers": {"image": image, "text": text}}
    model["views"] = {"image": "image", "text": "text"}
    if given.pretrained.endswith(".safetensors"):
        model["weights"] = given.pretrained
    return model


def _optimizer(given: argparse.Namespace, notes: list[Note]) -> dict[str, Any]:
    name = given.opt.removeprefix("timm/")
    rates = {"lr": given.lr or 5e-4, "weight_decay": given.wd}
    if name not in ("adamw", "lamb", "lars", "lion", "muon", "sgd"):
        notes.append(Note(f"--opt {given.opt}", "not offered: adamw in its place"))
        name = "adamw"
    found: dict[str, Any] = {"name": name, **rates}
    if name in ("adamw", "lamb", "lion", "muon") and None not in (given.beta1, given.beta2):
        found["betas"] = [given.beta1, given.beta2]
    if name in ("adamw", "lamb") and given.eps is not None:
        found["eps"] = given.eps
    if name in ("lars", "muon", "sgd") and given.momentum is not None:
        found["momentum"] = given.momentum
    return found


def _schedule(given: argparse.Namespace, notes: list[Note]) -> dict[str, Any]:
    if given.skip_scheduler:
        return {"kind": "constant", "warmup_steps": 0}
    if given.lr_scheduler == "const-cooldown":
        notes.append(Note("--lr-scheduler const-cooldown", "no cool-down: constant to the end"))
    kind = "cosine" if given.lr_scheduler == "cosine" else "constant"
    return {"kind": kind, "warmup_steps": given.warmup}


def _locked(given: argparse.Namespace) -> dict[str, Any]:
    towers = {
        "image": (given.lock_image, given.lock_image_unlocked_groups),
        "text": (given.lock_text, given.lock_text_unlocked_layers),
    }
    return {name: {"trained_layers": layers} if layers else {} for name, (lock, layers) in towers.items() if lock}


TRANSLATED = {
    "model", "pretrained", "train_data", "logs", "name", "seed", "batch_size", "accum_freq", "epochs", "lr", "beta1",
    "beta2", "eps", "wd", "momentum", "opt", "warmup", "lr_scheduler", "skip_scheduler", "precision", "grad_clip_norm",
    "workers", "log_every_n_steps", "siglip", "force_patch_dropout", "lock_image", "lock_image_unlocked_groups",
    "lock_text", "lock_text_unlocked_layers", "grad_checkpointing", "torchcompile",
}  # fmt: skip


def _left_out(given: argparse.Namespace, default: argparse.Namespace) -> list[Note]:
    notes = []
    for name, value in vars(given).items():
        if name not in TRANSLATED and value != getattr(default, name):
            said = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            notes.append(Note(said, WITHOUT.get(name, "no equivalent")))
    return notes
