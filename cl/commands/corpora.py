"""The care of corpora: look at samples, check, take samples out, hand selections to others."""

from __future__ import annotations

import sys
from typing import Any

import click

from cl.commands.base import cli, example, json_option, load, run
from cl.errors import ConfigError


@cli.command(
    short_help="Show a sample by its id, or a batch of a training run.",
    epilog=example(
        "clew inspect runs/curated 0f3a9c2e --save /tmp", "clew inspect runs/model --step 17 --epoch 1 --json"
    ),
)
@click.argument("folder", metavar="CORPUS|RUN")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--step", type=int, help="Of a training run: show the samples of this step.")
@click.option("--epoch", type=int, default=0, show_default=True, help="The epoch of the step.")
@click.option("--save", help="Folder to write the samples' images to.")
@json_option
def inspect(folder: str, ids: tuple[str, ...], step: int | None, epoch: int, save: str | None, as_json: bool) -> None:
    """Show samples of a corpus by their ids, or the samples of one step of a training run.

    An ID may be cut short. Shown are all columns, the image's place, whether its bytes are those that were ingested,
    and which stage dropped the sample, if one did.
    """
    if (step is None) == (not ids):
        raise ConfigError("clew inspect takes ids of samples of a corpus, or a training run and --step; one of them.")
    if step is not None:
        run("clew inspect", as_json, lambda: load("pipelines.inspect:inspect_batch")(folder, epoch, step))
        return
    find = load("pipelines.inspect:inspect_samples")
    run("clew inspect", as_json, lambda: find(folder, ids, save), _show_samples)


def _show_samples(samples: list[Any]) -> None:
    from cl import console

    for sample in samples:
        console.print_result(sample.id, sample)


@cli.command(
    short_help="Check a corpus down to the bytes of its images.",
    epilog=example("clew verify runs/curated", "clew verify runs/curated --deep --json"),
)
@click.argument("corpus", metavar="CORPUS")
@click.option("--deep", is_flag=True, help="Decode every image too.")
@click.option("--threads", type=click.IntRange(min=1), help="Fragments read at a time; by default one a core.")
@json_option
def verify(corpus: str, deep: bool, threads: int | None, as_json: bool) -> None:
    """Check that a corpus is what its manifest says: counts, row groups, offsets, hashes, ids, lanes.

    One sentence a defect; exit code 1 if there is one.
    """
    result = run("clew verify", as_json, lambda: load("pipelines.verify:verify")(corpus, deep, threads))
    if result.defects:
        sys.exit(1)


@cli.command(
    short_help="Take samples out of corpora for good.",
    epilog=example("clew remove --ids ids.txt runs/corpus runs/curated"),
)
@click.argument("corpora", nargs=-1, required=True, metavar="CORPUS...")
@click.option("--ids", required=True, help="Text file with the ids of the samples, one a line.")
@json_option
def remove(corpora: tuple[str, ...], ids: str, as_json: bool) -> None:
    """Take samples out of corpora for good, by their ids.

    Only fragments and shards that hold one are rewritten. The ids stay with the corpus, and no later run brings the
    samples back. An interrupted removal is finished by the same command.
    """
    run("clew remove", as_json, lambda: load("pipelines.remove:remove")(corpora, ids))


@cli.command(
    short_help="Write the uids of a selection as a DataComp subset file.",
    epilog=example(
        "clew subset runs/curated --out subset.npy",
        "clew subset metadata/ --out subset.npy --top clip_l14_similarity_score=0.3",
    ),
)
@click.argument("inputs", nargs=-1, required=True, metavar="CORPUS...|METADATA...")
@click.option("--out", required=True, help="The .npy file to write.")
@click.option("--min", "low", multiple=True, metavar="COLUMN=NUMBER", help="Of metadata: the lowest value allowed.")
@click.option("--max", "high", multiple=True, metavar="COLUMN=NUMBER", help="Of metadata: the highest value allowed.")
@click.option("--top", metavar="COLUMN=FRACTION", help="Of metadata: the fraction with the highest values.")
@json_option
def subset(
    inputs: tuple[str, ...], out: str, low: tuple[str, ...], high: tuple[str, ...], top: str | None, as_json: bool
) -> None:
    """Write the uids of corpora's samples, or of the rows of DataComp metadata files that pass, as a subset file.

    The file is the one that DataComp's resharder reads: a sorted numpy array of dtype "u8,u8".
    """
    bounds = dict(_column_number("--min", word) for word in low), dict(_column_number("--max", word) for word in high)
    best = None if top is None else _column_number("--top", top)
    if best is not None and not 0 < best[1] <= 1:
        raise ConfigError(f"--top {top}: the fraction must be above 0 and at most 1.")
    run("clew subset", as_json, lambda: load("pipelines.datacomp:subset")(inputs, out, *bounds, best))


def _column_number(option: str, word: str) -> tuple[str, float]:
    """The two sides of COLUMN=NUMBER."""
    name, _, number = word.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise ConfigError(f"{option} {word!r} must have the form COLUMN=NUMBER.") from None
