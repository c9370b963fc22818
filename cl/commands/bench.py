"""Measurements of what a run would do, without the run."""

from __future__ import annotations

import click

from cl.commands.base import cli, example, json_option, load, run, split
from cl.errors import ConfigError


@cli.group(
    short_help="Measure a part of a run by itself.", epilog=example("clew bench data sample-clip corpus=runs/curated")
)
def bench() -> None:
    """Measure a part of a run by itself, on this machine."""


@bench.command(
    short_help="How fast a training config's data arrive.",
    epilog=example(
        "clew bench data sample-clip corpus=runs/curated",
        "clew bench data run.yaml --threads 1 --threads 4 --threads 16 --steps 100 --workers 8",
    ),
)
@click.argument("words", nargs=-1, metavar="CONFIG [FIELD=VALUE]...")
@click.option("--threads", type=int, multiple=True, help="Decoding threads to try (more than once); default: config's.")
@click.option("--steps", type=int, default=20, show_default=True, help="Batches that are timed.")
@click.option("--workers", type=int, default=1, show_default=True, help="Workers that share a batch; one is measured.")
@json_option
def data(words: tuple[str, ...], threads: tuple[int, ...], steps: int, workers: int, as_json: bool) -> None:
    """Read, decode, augment and tokenise batches as `clew train CONFIG` would, without a model, and time them.

    The rates are of one worker. Nothing is written.
    """
    from cl.config import load_config

    names, overrides = split(words)
    if len(names) != 1:
        raise ConfigError(f"clew bench data takes one training config, but got {', '.join(names) or 'none'}.")
    if not any(word.startswith("out=") for word in overrides):
        overrides.append("out=unused")
    config = load_config(load("cl.training.config:TrainConfig"), "train", names[0], overrides)
    counts = threads or (config.loader.threads,)
    run(
        "clew bench data",
        as_json,
        lambda: load("cl.training.throughput:measure_data")(config, counts, steps, workers),
        lambda rows: load("cl.console:print_rows")("clew bench data", [row.model_dump() for row in rows]),
    )
