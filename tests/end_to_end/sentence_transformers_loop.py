"""sentence-transformers' own training, with the loss that a run names: its model, trainer, sampler and evaluation.

    torchrun --nproc-per-node W -m tests.end_to_end.sentence_transformers_loop RUNS.json MODEL PAIRS.parquet OUT

One process trains every run of RUNS.json in turn and rank 0 writes OUT/NAME.safetensors (the weights), OUT/NAME.json
(what the trainer logged) and OUT/NAME/README.md (its model card).
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DIMENSIONS = 32


@dataclass(frozen=True)
class Run:
    """One training: `steps` optimizer steps of `accumulate` times `batch` pairs a process."""

    name: str
    module: str  # cl.losses, or sentence_transformers.losses
    loss: str  # the class in it
    arguments: dict[str, Any] = field(default_factory=dict)
    batch: int = 8
    steps: int = 4
    accumulate: int = 1
    dropout: float = 0.0
    precision: str = "fp64"  # fp64, fp32 or bf16 (autocast)
    matryoshka: list[int] = field(default_factory=list)  # dimensions, or none


def write_model(folder: Path, texts: list[str]) -> None:
    """A BERT of two layers, whose vocabulary are the words of the texts."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=5 + len(words),
        hidden_size=DIMENSIONS,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)


def make_model(run: Run, folder: str) -> Any:
    """The model of the folder, with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    dropout = {"hidden_dropout_prob": run.dropout, "attention_probs_dropout_prob": run.dropout}
    transformer = Transformer(folder, max_seq_length=24, config_kwargs=dropout)
    model = SentenceTransformer(modules=[transformer, Pooling(DIMENSIONS)], device="cpu")
    return model.double() if run.precision == "fp64" else model


def make_loss(run: Run, model: nn.Module) -> nn.Module:
    """The import is all that differs between the original and the drop-in."""
    import importlib

    from sentence_transformers.losses import MatryoshkaLoss

    loss = getattr(importlib.import_module(run.module), run.loss)(model, **run.arguments)
    return MatryoshkaLoss(model, loss, run.matryoshka) if run.matryoshka else loss


def train(run: Run, start: str, pairs: str, out: str) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights, and the trainer's records."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    folder = Path(out) / run.name
    folder.mkdir(parents=True, exist_ok=True)
    data = Dataset.from_parquet(pairs, cache_dir=str(folder / "cache"))
    model = make_model(run, start)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=run.steps,
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulate,
        learning_rate=1e-3,
        bf16=run.precision == "bf16",
        use_cpu=True,
        ddp_backend="gloo",
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=3,
    )
    held_out = data.select(range(len(data) - 32, len(data)))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=data.select(range(len(data) - 32)),
        eval_dataset=held_out,
        loss=make_loss(run, model),
    )
    trainer.train()
    trainer.create_model_card()
    return {name: value.detach().contiguous() for name, value in model.state_dict().items()}, trainer.state.log_history


def main(runs: str, start: str, pairs: str, out: str) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    for fields in json.loads(Path(runs).read_text()):
        run = Run(**fields)
        rank = os.environ.get("RANK", "0")
        weights, log = train(run, start, pairs, out if rank == "0" else f"{out}/{rank}")
        if rank == "0":
            save_file(weights, f"{out}/{run.name}.safetensors")
            Path(f"{out}/{run.name}.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(*sys.argv[1:])
