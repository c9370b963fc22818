"""The jobs: ingest, download, curate, train, eval, sweep, embed, export, report, and the demo of them all."""

from __future__ import annotations

import json
from typing import Any

import click

from cl.commands.base import cli, example, json_option, load, output_options, run, run_config, split
from cl.errors import ConfigError


def _config_command(
    name: str,
    short: str,
    help_text: str,
    examples: tuple[str, ...],
    model: str,
    function: str,
    options: tuple[Any, ...] = (),
) -> None:
    """Add a command that runs one config.

    Args:
        name: of the command, and of the folder its shipped configs are in.
        short: what it does, in the list of commands.
        help_text: what it does, in its own help.
        examples: command lines that show its use.
        model: "module:Class" of the config.
        function: "module:function" that takes the config (and the command's own options) and returns the result.
        options: click options beyond the common ones.
    """

    def callback(words: tuple[str, ...], as_json: bool, print_config: bool, **own: Any) -> None:
        from cl.config import load_config

        names, overrides = split(words)
        if len(names) > 1:
            raise ConfigError(f"clew {name} takes one config, but got {', '.join(names)}.")
        if not names and not overrides and not print_config:
            raise ConfigError(f"clew {name} needs a config: a path or the name of a shipped one ({_shipped(name)}).")
        config = load_config(load(model), name, names[0] if names else None, overrides)
        run_config(name, config, print_config, as_json, lambda: load(function)(config, **own))

    callback = click.argument("words", nargs=-1, metavar="CONFIG [FIELD=VALUE]...")(output_options(callback))
    for option in reversed(options):
        callback = option(callback)
    cli.command(name, short_help=short, help=help_text, epilog=example(*examples))(callback)


def _shipped(kind: str) -> str:
    from cl.config import shipped_configs

    kinds = [kind, "recipes"] if kind == "train" else [kind]
    return ", ".join(stem for each in kinds for stem in shipped_configs(each)) or "none"


@cli.command(
    short_help="Make a corpus of tars, parquet or jsonl.",
    epilog=example(
        "clew ingest shards/*.tar --out runs/corpus",
        "clew ingest pairs.parquet --out runs/pairs kind=text-text columns.anchor=question columns.positive=answer",
    ),
)
@click.argument("words", nargs=-1, metavar="SRC... [FIELD=VALUE]...")
@click.option("--out", help="Folder or URL of the corpus that is made.")
@click.option("--config", "name", help="Start from a config: a path or the name of a shipped one.")
@output_options
def ingest(words: tuple[str, ...], out: str | None, name: str | None, as_json: bool, print_config: bool) -> None:
    """Make a corpus of webdataset tars, parquet or jsonl files.

    SRC are files, folders or URLs. Image bytes stay where they are; captions, sizes, hashes and places go to a table.
    What cannot be used goes to the corpus's quarantine with its shard, key and reason.
    """
    if not split(words)[0] and name is None and not print_config:
        raise ConfigError("clew ingest needs at least one source: a tar, parquet or jsonl file, a folder or a URL.")
    config = _load_with_inputs("pipelines.ingest:IngestConfig", "ingest", words, out, name)
    run_config("ingest", config, print_config, as_json, lambda: load("pipelines.ingest:ingest")(config))


def _load_with_inputs(model: str, kind: str, words: tuple[str, ...], out: str | None, name: str | None) -> Any:
    """The config of a command whose words are inputs and overrides."""
    from cl.config import load_config

    inputs, overrides = split(words)
    if inputs:
        overrides.append(f"inputs={json.dumps(inputs)}")
    if out is not None:
        overrides.append(f"out={json.dumps(out)}")
    return load_config(load(model), kind, name, overrides)


@cli.command(
    short_help="Fetch images by tables of URLs with captions.",
    epilog=example(
        "clew download urls.parquet --out runs/corpus columns.url=URL columns.text=TEXT",
        "clew download metadata/ --out s3://bucket/pool columns.key=uid columns.sha256=sha256 source=datacomp",
    ),
)
@click.argument("words", nargs=-1, metavar="TABLE... [FIELD=VALUE]...")
@click.option("--out", help="Folder or URL of the corpus that is made.")
@click.option("--config", "name", help="Start from a config: a path or the name of a shipped one.")
@output_options
def download(words: tuple[str, ...], out: str | None, name: str | None, as_json: bool, print_config: bool) -> None:
    """Fetch images by tables of URLs with captions, and make a corpus of them.

    TABLE are parquet, jsonl, csv or tsv files, folders or URLs. robots.txt and opt-out headers are honoured, hosts of
    private networks are not asked. What cannot be had goes to the corpus's quarantine with its reason.
    """
    if not split(words)[0] and name is None and not print_config:
        raise ConfigError("clew download needs at least one table: a parquet, jsonl, csv or tsv file, a folder or URL.")
    config = _load_with_inputs("pipelines.download:DownloadConfig", "download", words, out, name)
    run_config("download", config, print_config, as_json, lambda: load("pipelines.download:download")(config))


_config_command(
    "curate",
    "Filter, deduplicate, score and select.",
    "Filter, deduplicate, score, cluster and select a corpus's samples, and write the chosen ones as new shards.\n\n"
    "Every dropped sample keeps its reason. Killed and started again, it goes on and ends with the same bytes.",
    ("clew curate sample corpus=runs/corpus model=runs/scorer out=runs/curated", "clew curate sample --print-config"),
    "pipelines.curate:CurateConfig",
    "pipelines.curate:curate",
)
_config_command(
    "train",
    "Pretrain a contrastive model.",
    "Pretrain a contrastive model on one or more corpora, with negatives from all workers.",
    (
        "clew train sample-clip corpus=runs/curated out=runs/model",
        "clew train sample-clip corpus=runs/curated out=runs/model optimizer.lr=1e-3 workers.count=2 --resume",
    ),
    "cl.training.config:TrainConfig",
    "cl.training.run:train",
    (click.option("--resume", is_flag=True, help="Go on from the run's last checkpoint."),),
)
_config_command(
    "eval",
    "Measure a trained model.",
    "Measure a trained model: retrieval, zero-shot classification, alignment and uniformity, with chance beside them.",
    ("clew eval sample checkpoint=runs/model corpora.unseen=runs/heldout out=runs/eval",),
    "cl.evaluation.run:EvalConfig",
    "cl.evaluation.run:evaluate",
)
_config_command(
    "sweep",
    "Try many settings of a training run.",
    "Try many settings of a training run at an equal budget of samples, and rank them by a metric.",
    ("clew sweep sample train.corpus=runs/curated validation=runs/heldout out=runs/sweep",),
    "cl.sweeps.config:SweepConfig",
    "cl.sweeps.run:sweep",
)
_config_command(
    "embed",
    "Embed a corpus with a trained model.",
    "Embed a corpus with a trained model.",
    ("clew embed sample corpus=runs/curated checkpoint=runs/model out=runs/embeddings",),
    "pipelines.embed:EmbedConfig",
    "pipelines.embed:embed",
)


@cli.command(
    short_help="Write a trained model for another project.",
    epilog=example(
        "clew export runs/model --to open_clip --out runs/open-clip",
        "clew export runs/text --to sentence-transformers --out runs/sentence-transformer",
    ),
)
@click.argument("checkpoint")
@click.option("--to", "form", required=True, help="open_clip, huggingface or sentence-transformers.")
@click.option("--out", required=True, help="Folder that is made.")
@json_option
def export(checkpoint: str, form: str, out: str, as_json: bool) -> None:
    """Write a CHECKPOINT (or the newest of a run) in the format of open_clip, Hugging Face or sentence-transformers."""
    run("clew export", as_json, lambda: load("cl.export.run:export")(checkpoint, form, out))


@cli.command(
    short_help="Make an HTML page of run folders.",
    epilog=example("clew report runs/curated runs/model runs/eval --out runs/report.html"),
)
@click.argument("dirs", nargs=-1, required=True, metavar="DIR...")
@click.option("--out", required=True, help="The HTML file to write.")
@json_option
def report(dirs: tuple[str, ...], out: str, as_json: bool) -> None:
    """Make one HTML page of one or more run folders; it needs no network to open."""
    run("clew report", as_json, lambda: load("pipelines.report.build:build_report")(list(dirs), out))


@cli.command(
    short_help="Run the whole job on the shipped corpus.",
    epilog=example("clew demo", "clew demo --out /tmp/demo --json"),
)
@click.option("--out", default="runs/demo", show_default=True, help="Folder that the demo writes into.")
@json_option
def demo(out: str, as_json: bool) -> None:
    """Run the whole job on the corpus that ships with Clew: ingest, curate, train, eval, sweep, report."""
    run("clew demo", as_json, lambda: load("cl.demo:demo")(out))
