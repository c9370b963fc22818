"""Configs of other projects as Clew's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cl.commands.base import cli, example, json_option, load
from cl.errors import ConfigError


@cli.group(
    "import-config",
    short_help="Translate a training config of another project.",
    epilog=example(
        "clew import-config open_clip --gpus 8 -- --model ViT-B-32 --batch-size 512 --precision amp_bf16",
        "clew import-config sentence-transformers arguments.json --model MODEL_FOLDER",
    ),
)
def import_config() -> None:
    """Translate a training config of another project, and list what of it has no equivalent.

    The config goes to stdout, what is left out stands in comments above it.
    """


def _print(as_json: bool, translate: Callable[[], Any]) -> None:
    from cl import console
    from cl.config import parse_config

    found = translate()
    parse_config(load("cl.training.config:TrainConfig"), found.config, "the translated config")
    if as_json:
        console.print_json({"config": found.config, "notes": [note._asdict() for note in found.notes]})
    else:
        click.echo(found.to_yaml(), nl=False)


@import_config.command("open_clip", short_help="Flags of open_clip_train.main.")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="Processes it was started on.")
@json_option
def open_clip(flags: tuple[str, ...], gpus: int, as_json: bool) -> None:
    """Translate FLAGS of `python -m open_clip_train.main`, given behind `--`."""
    _print(as_json, lambda: load("cl.importing.open_clip:import_open_clip")(flags, gpus))


@import_config.command("sentence-transformers", short_help="Arguments of SentenceTransformerTrainer.")
@click.argument("arguments", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Folder of the model that training starts from.")
@click.option("--loss", default="MultipleNegativesRankingLoss", show_default=True, help="Class of the loss.")
@click.option("--scale", type=float, help="Of the loss; default: its own.")
@click.option("--mini-batch-size", type=int, help="Of a cached loss.")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="Processes it was started on.")
@json_option
def sentence_transformers(arguments: Path, as_json: bool, **options: Any) -> None:
    """Translate ARGUMENTS, the JSON file that `args.to_json_string()` gives."""

    def translate() -> Any:
        try:
            fields = json.loads(arguments.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{arguments} is no readable JSON file: {error}.") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"{arguments} must hold one JSON object, the training arguments.")
        return load("cl.importing.sentence_transformers:import_sentence_transformers")(fields, **options)

    _print(as_json, translate)
