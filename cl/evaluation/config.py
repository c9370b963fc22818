"""The config of an evaluation.

checkpoint: runs/clip
corpora:
  emoji: data/emoji-heldout                 # a path: the metrics below
  clipart: {path: data/clipart-val, metrics: [retrieval]}
metrics:
  - retrieval
  - zero_shot: {label: category, templates: ["{}", "an emoji of {}"]}
out: runs/eval
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from cl.config import Config

Precision = Literal["fp32", "bf16"]


def _metrics(value: Any) -> Any:
    """A metric may be its name alone, or {name: options}."""
    if not isinstance(value, list):
        return value
    listed: list[dict[str, dict[str, Any]]] = []
    for item in value:
        if isinstance(item, str):
            listed.append({item: {}})
        elif isinstance(item, dict) and len(item) == 1:
            listed.append({name: options or {} for name, options in item.items()})
        else:
            raise ValueError("each metric is a name or a mapping {name: {option: value}}")
    return listed


MetricList = Annotated[list[dict[str, dict[str, Any]]], BeforeValidator(_metrics)]


class CorpusEval(Config):
    """One corpus to evaluate on."""

    path: str = Field(description="folder or fsspec URL of a corpus, raw or curated")
    metrics: MetricList | None = Field(None, description="instead of the evaluation's own list")
    limit: int | None = Field(
        None, ge=1, description="samples to use: those with the smallest ids, a fixed random choice"
    )


def _corpora(value: Any) -> Any:
    """A corpus may be its path alone, and a single one need not be named: the end of its path is its name."""
    if isinstance(value, str):
        value = {value.rstrip("/").rsplit("/", 1)[-1]: value}
    if not isinstance(value, dict):
        return value
    return {name: {"path": item} if isinstance(item, str) else item for name, item in value.items()}


Corpora = Annotated[dict[str, CorpusEval], BeforeValidator(_corpora)]


class EvalConfig(Config):
    """An evaluation of one checkpoint on any number of corpora."""

    checkpoint: str = Field(description="a checkpoint folder, or a training run (its newest checkpoint)")
    corpora: Corpora = Field({}, description="at least one: name -> path, or {path, metrics, limit}")
    metrics: MetricList | None = Field(
        None, description="names or {name: options}; null: every metric that fits the corpus and needs no options"
    )
    batch_size: int = Field(128, ge=1, description="images or texts embedded at a time")
    device: str = Field("auto", description="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    precision: Precision = Field("fp32", description="bf16: autocast, embeddings and scores stay fp32")
    threads: int = Field(2, ge=1, description="threads that read and decode images ahead of the model")
    out: str = Field(description="folder for eval.json and run.json")
