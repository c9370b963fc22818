"""`clew eval`: a checkpoint and corpora in, eval.json out.

result = evaluate(EvalConfig(checkpoint="runs/clip", corpora={"val": "data/val"}, out="runs/eval"))
result.corpora["val"].figure("retrieval/text_to_image/R@1").value
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from cl import storage
from cl.config import parse_config
from cl.corpus import Corpus, open_corpus
from cl.errors import ConfigError
from cl.evaluation.config import CorpusEval, EvalConfig, MetricList
from cl.evaluation.embed import Encoder, embed_corpus, pick_device
from cl.evaluation.registry import METRICS, Example, Figure, Metric
from cl.progress import progress
from cl.run import write_run_info

__all__ = ["CorpusResult", "EvalConfig", "EvalResult", "evaluate", "evaluate_corpus", "make_metrics"]


class CorpusResult(BaseModel):
    """What was measured on one corpus."""

    path: str
    kind: str
    samples: int  # used; the others are counted in `excluded`
    excluded: dict[str, int]  # reason -> samples
    metrics: list[Figure]
    examples: list[Example]
    notes: dict[str, Any]  # by metric family

    def figure(self, name: str) -> Figure:
        """The figure of that name.

        Raises:
            ConfigError: not measured here; names what was.
        """
        for figure in self.metrics:
            if figure.metric == name:
                return figure
        known = ", ".join(figure.metric for figure in self.metrics)
        raise ConfigError(f"Metric {name!r} was not measured on {self.path}: choose from {known}.")


class EvalResult(BaseModel):
    """The contents of eval.json."""

    checkpoint: str
    corpora: dict[str, CorpusResult]

    def shown(self) -> dict[str, Any]:
        """What a terminal shows: each corpus's figures beside chance."""
        return {
            "checkpoint": self.checkpoint,
            **{
                f"{name}: {result.samples} samples": [
                    {"metric": figure.metric, "value": figure.value, "chance": figure.chance}
                    for figure in result.metrics
                ]
                for name, result in self.corpora.items()
            },
        }


def make_metrics(kind: str, metrics: MetricList | None, where: str) -> list[tuple[str, Metric[Any]]]:
    """The metrics to measure on a corpus of a kind; of a list, those that apply to the kind.

    Raises:
        ConfigError: an unknown metric or option, or none is left.
    """
    chosen: list[tuple[str, dict[str, Any]]]
    if metrics is None:
        chosen = [(entry.name, {}) for entry in METRICS.entries() if entry.value.default and kind in entry.value.kinds]
    else:
        chosen = [(name, options) for item in metrics for name, options in item.items()]
    made: list[tuple[str, Metric[Any]]] = []
    for name, options in chosen:
        metric = METRICS[name]
        checked = parse_config(metric.Options, options, where=f"{where}: metric {name}")
        if kind in metric.kinds:
            made.append((name, metric(checked)))
    if not made:
        asked = ", ".join(name for name, _ in chosen) or "none"
        raise ConfigError(f"{where}: no metric of the list ({asked}) applies to {kind} pairs.")
    return made


def evaluate_corpus(
    name: str, corpus: Corpus, metrics: list[tuple[str, Metric[Any]]], encoder: Encoder, limit: int | None = None
) -> CorpusResult:
    """Embed one corpus once and measure all its metrics."""
    was_training = encoder.model.training
    encoder.model.eval()
    try:
        with progress(f"Embedding {name}", unit="items") as bar:

            def started(total: int) -> Any:
                bar.update(total=total)
                return bar.advance

            data = embed_corpus(corpus, encoder, limit, started)
            figures, examples, notes = [], [], {}
            for family, metric in metrics:
                bar.update(note=f"measuring {family}")
                measured = metric.measure(data)
                figures += measured.figures
                examples += measured.examples
                if measured.notes:
                    notes[family] = measured.notes
            bar.update(note="")
    finally:
        encoder.model.train(was_training)
    return CorpusResult(
        path=corpus.root,
        kind=corpus.kind,
        samples=data.samples,
        excluded=data.excluded,
        metrics=figures,
        examples=examples,
        notes=notes,
    )


def open_evals(
    corpora: dict[str, CorpusEval], metrics: MetricList | None
) -> dict[str, tuple[Corpus, list[tuple[str, Metric[Any]]]]]:
    """Open all corpora and make their metrics, so that a mistake in any is found before the first is embedded."""
    opened = {}
    for name, spec in corpora.items():
        corpus = open_corpus(spec.path)
        asked = spec.metrics if spec.metrics is not None else metrics
        opened[name] = (corpus, make_metrics(corpus.kind, asked, f"corpora.{name}"))
    return opened


def evaluate(cfg: EvalConfig) -> EvalResult:
    """Evaluate a checkpoint on corpora and write OUT/eval.json, OUT/run.json and OUT/config.yaml.

    Raises:
        ConfigError, DataError: see `make_metrics`, `open_corpus`, `embed_corpus`.
    """
    if not cfg.corpora:
        raise ConfigError("corpora names nothing to evaluate on: give corpora.NAME=PATH.")
    opened = open_evals(cfg.corpora, cfg.metrics)
    device = pick_device(cfg.device)
    with write_run_info(cfg.out, "eval", cfg) as info:
        from cl.encoders import load_checkpoint_model

        model, inputs, _ = load_checkpoint_model(cfg.checkpoint)
        encoder = Encoder(model.to(device), inputs, device, cfg.batch_size, cfg.precision == "bf16", cfg.threads)
        corpora = {
            name: evaluate_corpus(name, corpus, metrics, encoder, cfg.corpora[name].limit)
            for name, (corpus, metrics) in opened.items()
        }
        result = EvalResult(checkpoint=cfg.checkpoint, corpora=corpora)
        storage.write_json(storage.join(cfg.out, "eval.json"), result.model_dump())
        info.add(samples={name: each.samples for name, each in corpora.items()})
    return result
