"""sentence-transformers' training arguments (the JSON of `SentenceTransformerTrainingArguments`) and its loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl import storage
from cl.errors import ConfigError
from cl.importing import Imported, Note

# Loss -> (objective without its temperature, default scale)
LOSSES: dict[str, tuple[dict[str, Any], float]] = {
    "MultipleNegativesRankingLoss": ({"name": "infonce", "direction": "forward"}, 20.0),
    "CachedMultipleNegativesRankingLoss": ({"name": "infonce", "direction": "forward"}, 20.0),
    "MultipleNegativesSymmetricRankingLoss": ({"name": "infonce"}, 20.0),
    "CachedMultipleNegativesSymmetricRankingLoss": ({"name": "infonce"}, 20.0),
    "CoSENTLoss": ({"name": "cosent"}, 20.0),
    "AnglELoss": ({"name": "angle"}, 20.0),
}
POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
WITHOUT = {
    "gradient_accumulation_steps": "its negatives are those of one small batch; batch_size is the whole batch here, "
    "with micro_batch in the memory of a small one",
    "warmup_ratio": "schedule.warmup_steps counts steps",
    "num_train_epochs": "epochs is a whole number",
    "eval_strategy": "clew eval measures checkpoints of the run",
    "eval_steps": "clew eval measures checkpoints of the run",
    "load_best_model_at_end": "clew eval measures checkpoints of the run",
    "prompts": "texts are read as they are: put the prompt in front of them in the corpus",
    "multi_dataset_batch_sampler": "mixture says how batches are made of several corpora",
    "push_to_hub": "clew export writes a folder; nothing is uploaded",
    "report_to": "metrics.jsonl and TensorBoard files are always written",
    "resume_from_checkpoint": "give --resume to clew train",
    "use_cpu": "the device is the GPU that a worker gets, else the CPU",
    "dataloader_pin_memory": "batches are pinned where there is a GPU",
    "deepspeed": "parallel.strategy fsdp",
    "fsdp": "parallel.strategy fsdp",
}
TRANSLATED = {
    "output_dir", "seed", "per_device_train_batch_size", "max_steps", "learning_rate", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "warmup_steps", "lr_scheduler_type", "bf16", "fp16", "optim",
    "dataloader_num_workers", "logging_steps", "save_steps", "save_total_limit", "gradient_checkpointing",
    "torch_compile", "batch_sampler", "num_train_epochs",
}  # fmt: skip


def import_sentence_transformers(
    arguments: Mapping[str, Any],
    model: str,
    loss: str = "MultipleNegativesRankingLoss",
    scale: float | None = None,
    mini_batch_size: int | None = None,
    gpus: int = 1,
) -> Imported:
    """Translate training arguments.

    Args:
        arguments: fields of the JSON that `args.to_json_string()` gives, or some of them.
        model: folder of the model that training starts from.
        loss: class of the loss.
        scale: of the loss; None: its default.
        mini_batch_size: of a cached loss.
        gpus: processes that it was started on.

    Raises:
        ConfigError: a loss without an equivalent, a folder without a transformer.
    """
    if loss not in LOSSES:
        raise ConfigError(f"The loss {loss!r} has no translation; those that have one are {', '.join(LOSSES)}.")
    objective, default_scale = LOSSES[loss]
    notes: list[Note] = []
    given = _Arguments(arguments)
    batch = int(given("per_device_train_batch_size", 8)) * gpus
    steps = int(given("max_steps", -1))
    epochs = float(given("num_train_epochs", 3))
    if steps <= 0 and epochs != int(epochs):
        notes.append(Note(f"num_train_epochs {epochs}", WITHOUT["num_train_epochs"]))
    cached = loss.startswith("Cached")
    precision = "bf16" if given("bf16", False) or given("fp16", False) else "fp32"
    if given("fp16", False):
        notes.append(Note("fp16 true", "fp16 is not offered: bf16 has the range of fp32"))
    config = {
        "out": given("output_dir", "runs/text"),
        "corpus": "runs/pairs",
        "seed": int(given("seed", 42)),
        "model": _model(model, notes),
        "objective": {**objective, "temperature": 1 / (scale or default_scale), "learn_temperature": False},
        "batch_size": batch,
        **({"micro_batch": mini_batch_size or 32} if cached else {}),
        **({"steps": steps} if steps > 0 else {"epochs": max(round(epochs), 1)}),
        "optimizer": _optimizer(given, notes),
        "schedule": _schedule(given, notes),
        "precision": precision,
        "clip_norm": float(given("max_grad_norm", 1.0)) or None,
        "workers": {"count": gpus},
        "loader": {"threads": max(int(given("dataloader_num_workers", 0)), 1)},
        "log_every": max(int(given("logging_steps", 500)), 1),
        "checkpoint": {
            "every_steps": max(int(given("save_steps", 500)), 1),
            **({"keep_last": given("save_total_limit", None)} if given("save_total_limit", None) else {}),
        },
    }
    parallel = {"activation_checkpointing": "gradient_checkpointing", "compile": "torch_compile"}
    if wanted := {name: True for name, argument in parallel.items() if given(argument, False)}:
        config["parallel"] = wanted
    if "no_duplicates" in str(given("batch_sampler", "")).lower():
        notes.append(Note("batch_sampler no_duplicates", "not needed: equal texts are never each other's negatives"))
    return Imported(config, notes + _left_out(arguments))


class _Arguments:
    """Arguments by name, with the defaults of the original where they are not given."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments

    def __call__(self, name: str, default: Any) -> Any:
        value = self.arguments.get(name)
        return default if value is None else value


def _model(folder: str, notes: list[Note]) -> dict[str, Any]:
    """One tower for both sides, with the pooling and length that the folder names."""
    root = Path(folder)
    modules = storage.read_json(str(root / "modules.json")) if (root / "modules.json").is_file() else []
    inner = next((root / each["path"] for each in modules if each["type"].endswith("Transformer")), root)
    if not (inner / "config.json").is_file():
        raise ConfigError(f"{folder} holds no transformer: give a folder of sentence-transformers or of AutoModel.")
    shape = storage.read_json(str(inner / "config.json"))
    tower: dict[str, Any] = {"family": "huggingface", "name": str(inner), "head": "none", "pooling": "mean"}
    for each in modules:
        kind = each["type"].rpartition(".")[2]
        if kind == "Pooling":
            pooling = storage.read_json(str(root / each["path"] / "config.json"))
            modes = [name for name in POOLINGS if pooling.get(f"pooling_mode_{_long(name)}")]
            modes = modes or [str(pooling.get("pooling_mode", "mean"))]
            if modes[0] in POOLINGS:
                tower["pooling"] = POOLINGS[modes[0]]
            else:
                notes.append(Note(f"pooling {modes[0]}", "no equivalent: mean in its place"))
        elif kind not in ("Transformer", "Normalize"):
            notes.append(Note(f"module {kind}", "no equivalent: the tower ends in its pooling"))
    sizes = root / "sentence_bert_config.json"
    longest = storage.read_json(str(sizes)).get("max_seq_length") if sizes.is_file() else None
    if longest:
        tower["max_tokens"] = int(longest)
    views = {"anchor": "text", "positive": "text"}
    return {"embed_dim": int(shape["hidden_size"]), "towers": {"text": tower}, "views": views}


def _long(pooling: str) -> str:
    return {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}[pooling]


def _optimizer(given: _Arguments, notes: list[Note]) -> dict[str, Any]:
    if "adamw" not in str(given("optim", "adamw_torch")):
        notes.append(Note(f"optim {given('optim', '')}", "not offered: adamw in its place"))
    return {
        "name": "adamw",
        "lr": float(given("learning_rate", 5e-5)),
        "betas": [float(given("adam_beta1", 0.9)), float(given("adam_beta2", 0.999))],
        "eps": float(given("adam_epsilon", 1e-8)),
        "weight_decay": float(given("weight_decay", 0.0)),
    }


def _schedule(given: _Arguments, notes: list[Note]) -> dict[str, Any]:
    name = str(given("lr_scheduler_type", "linear")).rpartition(".")[2].lower()
    if name not in ("cosine", "constant", "constant_with_warmup"):
        notes.append(Note(f"lr_scheduler_type {name}", "not offered: cosine in its place"))
    warmup = float(given("warmup_steps", 0))
    if 0 < warmup < 1:  # a share of the run
        notes.append(Note(f"warmup_steps {warmup}", WITHOUT["warmup_ratio"]))
        warmup = 0
    return {"kind": "constant" if name.startswith("constant") else "cosine", "warmup_steps": int(warmup)}


def _left_out(arguments: Mapping[str, Any]) -> list[Note]:
    """What is set otherwise than sentence-transformers does by itself, and is not translated."""
    usual = _defaults()
    notes = []
    for name, value in arguments.items():
        if name not in usual:
            raise ConfigError(f"sentence-transformers' training arguments have no {name!r}.")
        empty = value in (None, False, [], {}) and usual[name] in (None, False, [], {})
        if name not in TRANSLATED and not empty and value != usual[name]:
            notes.append(Note(f"{name} {value}", WITHOUT.get(name, "no equivalent")))
    return notes


def _defaults() -> dict[str, Any]:
    """What `to_json_string` gives where nothing but the folder is set."""
    try:
        from sentence_transformers import SentenceTransformerTrainingArguments
    except ImportError as error:
        raise ConfigError(
            "Reading the arguments of sentence-transformers needs its package, to tell what is its default: "
            "pip install sentence-transformers."
        ) from error
    return dict(json.loads(SentenceTransformerTrainingArguments(output_dir="runs/text").to_json_string()))
