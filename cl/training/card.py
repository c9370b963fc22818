"""The model card of a finished run: what it is, how it was trained, on what, and with which versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cl import storage
from cl.config import dump_config
from cl.corpus import open_corpus
from cl.encoders.config import TowerConfig
from cl.run import versions
from cl.training.config import TrainConfig
from cl.training.outcome import TrainResult

NAME = "MODEL_CARD.md"


def write_card(cfg: TrainConfig, result: TrainResult) -> None:
    """Write `MODEL_CARD.md` into the run's folder: Markdown with a head that model hubs read."""
    name = Path(cfg.out).name
    kinds = sorted({open_corpus(path).kind for path in cfg.corpus_paths})
    head = yaml.safe_dump({"library_name": "clew", "tags": ["contrastive", *kinds]}, sort_keys=False)
    towers = [f"- `{tower}`: {_described(config)}" for tower, config in cfg.model.towers.items()]
    views = ", ".join(f"`{view}` by `{tower}`" for view, tower in cfg.model.readers.items())
    parts = [
        f"---\n{head}---\n\n# {name}\n",
        f"Trained with Clew. Embeddings have {cfg.model.embed_dim} numbers and length 1; views: {views}.\n",
        "\n".join(towers) + "\n",
        '```python\nfrom cl.encoders import load_checkpoint_model\n\nmodel, inputs, _ = load_checkpoint_model("'
        f'{cfg.out}")\n```\n',
        "## Training\n",
        _table(_training(cfg, result)),
        "## Data\n",
        "\n".join(_corpus(path) for path in cfg.corpus_paths) + "\n",
        "## Versions\n",
        _table(versions()),
        "## Config\n",
        f"```yaml\n{dump_config(cfg)}```\n",
    ]
    storage.write_bytes(storage.join(cfg.out, NAME), "\n".join(parts).encode())


def _described(tower: TowerConfig) -> str:
    fields = tower.model_dump()
    what = [str(fields[key]) for key in ("part", "name") if fields.get(key)]
    return ", ".join([tower.family, *what])


def _training(cfg: TrainConfig, result: TrainResult) -> dict[str, Any]:
    loss = "" if result.loss_first is None else f"{result.loss_first:.4g} to {result.loss_last:.4g}"
    return {
        "objective": cfg.objective.name,
        "global batch": cfg.batch_size,
        "optimizer steps": result.steps,
        "samples": result.samples,
        "optimizer": f"{cfg.optimizer.name}, peak rate {cfg.optimizer.lr:g}, decay {cfg.optimizer.weight_decay:g}",
        "precision": result.precision,
        "workers": result.workers,
        "hours of training": f"{result.seconds / 3600:.3g}",
        "loss, first to last record": loss,
        "seed": cfg.seed,
        "checkpoint": result.checkpoint,
    }


def _corpus(path: str) -> str:
    """A corpus and, as far as it says so itself, how it was made."""
    corpus = open_corpus(path)
    line = f"- `{path}`: {corpus.samples:,} {corpus.kind} samples"
    record = storage.join(path, "run.json")
    if not storage.exists(record):
        return line
    made = storage.read_json(record)
    digest = str(made.get("config_digest"))[:12]
    return f"{line}, made by `clew {made.get('command')}` (config {digest}, {made.get('finished')})"


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"
