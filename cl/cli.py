"""`clew`: one command a job.

    clew CMD [CONFIG] [field=value ...] [--json] [--print-config]

This file only parses words and prints results. Nothing heavy is imported until a command runs, so that `--help`
answers at once. What the user can mend is said in one sentence on stderr, with exit code 2 and no traceback; an
interrupted command exits with 130 and says how to go on.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import shlex
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import click

from cl import __version__
from cl.errors import ClewError, ConfigError, user_error


class Commands(click.Group):
    """A group that names the nearest command for one that does not exist."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.commands, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"There is no command {name!r}: choose from {', '.join(self.list_commands(ctx))}.{hint}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a user's work, not of the alphabet


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="clew")
def cli() -> None:
    """Contrastive learning at web scale: curate, pretrain, evaluate and sweep, on one machine or a cluster.

    A run is a YAML file, given by its path or by the name of one that ships with Clew; any field of it can be
    overridden as section.field=value. Start with `clew demo`.
    """


def _load(target: str) -> Any:
    """The object behind "module:name"."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--json", "as_json", is_flag=True, help="Print only JSON on stdout.")(function)
    return click.option("--print-config", is_flag=True, help="Print the resolved config and exit.")(function)


def _json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print only JSON on stdout.")(function)


def _example(*lines: str) -> str:
    return "\b\n" + "\n".join(["Example:", *(f"  {line}" for line in lines)])


def _split(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Names (paths, configs) and overrides among the words; a file that exists is a name even with "=" in it."""
    from cl.config import is_override

    overrides = [word for word in words if is_override(word) and not os.path.exists(word)]
    return [word for word in words if word not in overrides], overrides


def _run(
    command: str, config: Any, print_config: bool, as_json: bool, run: Callable[[], Any], title: str | None = None
) -> None:
    """Print the config, or run and print the result."""
    from cl import console

    if print_config:
        from cl.config import dump_config

        if as_json:
            console.print_json(config)
        else:
            click.echo(dump_config(config), nl=False)
    elif as_json:
        with console.stdout_kept_for_json():
            result = run()
        console.print_json(result)
    else:
        console.print_result(title or f"clew {command}", run())


def _config_command(
    name: str,
    short: str,
    help_text: str,
    example: tuple[str, ...],
    model: str,
    function: str,
    options: tuple[Any, ...] = (),
) -> None:
    """Add a command that runs one config.

    Args:
        name: of the command, and of the folder its shipped configs are in.
        short: what it does, in the list of commands.
        help_text: what it does, in its own help.
        example: command lines that show its use.
        model: "module:Class" of the config.
        function: "module:function" that takes the config (and the command's own options) and returns the result.
        options: click options beyond the common ones.
    """

    def callback(words: tuple[str, ...], as_json: bool, print_config: bool, **own: Any) -> None:
        from cl.config import load_config

        names, overrides = _split(words)
        if len(names) > 1:
            raise ConfigError(f"clew {name} takes one config, but got {', '.join(names)}.")
        if not names and not overrides and not print_config:
            raise ConfigError(f"clew {name} needs a config: a path or the name of a shipped one ({_shipped(name)}).")
        config = load_config(_load(model), name, names[0] if names else None, overrides)
        _run(name, config, print_config, as_json, lambda: _load(function)(config, **own))

    callback = click.argument("words", nargs=-1, metavar="CONFIG [FIELD=VALUE]...")(_output_options(callback))
    for option in reversed(options):
        callback = option(callback)
    cli.command(name, short_help=short, help=help_text, epilog=_example(*example))(callback)


def _shipped(kind: str) -> str:
    from cl.config import shipped_configs

    kinds = [kind, "recipes"] if kind == "train" else [kind]
    return ", ".join(stem for each in kinds for stem in shipped_configs(each)) or "none"


@cli.command(
    short_help="Make a corpus of tars, parquet or jsonl.",
    epilog=_example(
        "clew ingest shards/*.tar --out runs/corpus",
        "clew ingest pairs.parquet --out runs/pairs kind=text-text columns.anchor=question columns.positive=answer",
    ),
)
@click.argument("words", nargs=-1, metavar="SRC... [FIELD=VALUE]...")
@click.option("--out", help="Folder or URL of the corpus that is made.")
@click.option("--config", "name", help="Start from a config: a path or the name of a shipped one.")
@_output_options
def ingest(words: tuple[str, ...], out: str | None, name: str | None, as_json: bool, print_config: bool) -> None:
    """Make a corpus of webdataset tars, parquet or jsonl files.

    SRC are files, folders or URLs. Image bytes stay where they are; captions, sizes, hashes and places go to a table.
    What cannot be used goes to the corpus's quarantine with its shard, key and reason.
    """
    from cl.config import load_config

    sources, overrides = _split(words)
    if sources:
        import json

        overrides.append(f"inputs={json.dumps(sources)}")
    if out is not None:
        import json

        overrides.append(f"out={json.dumps(out)}")
    if not sources and name is None and not print_config:
        raise ConfigError("clew ingest needs at least one source: a tar, parquet or jsonl file, a folder or a URL.")
    config = load_config(_load("pipelines.ingest:IngestConfig"), "ingest", name, overrides)
    _run("ingest", config, print_config, as_json, lambda: _load("pipelines.ingest:ingest")(config))


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
    epilog=_example(
        "clew export runs/model --to open_clip --out runs/open-clip",
        "clew export runs/text --to sentence-transformers --out runs/sentence-transformer",
    ),
)
@click.argument("checkpoint")
@click.option("--to", "form", required=True, help="open_clip, huggingface or sentence-transformers.")
@click.option("--out", required=True, help="Folder that is made.")
@_json_option
def export(checkpoint: str, form: str, out: str, as_json: bool) -> None:
    """Write a CHECKPOINT (or the newest of a run) in the format of open_clip, Hugging Face or sentence-transformers."""
    _run("export", None, False, as_json, lambda: _load("cl.export.run:export")(checkpoint, form, out))


@cli.command(
    short_help="Show a sample by its id, or a batch of a training run.",
    epilog=_example(
        "clew inspect runs/curated 0f3a9c2e --save /tmp", "clew inspect runs/model --step 17 --epoch 1 --json"
    ),
)
@click.argument("folder", metavar="CORPUS|RUN")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@click.option("--step", type=int, help="Of a training run: show the samples of this step.")
@click.option("--epoch", type=int, default=0, show_default=True, help="The epoch of the step.")
@click.option("--save", help="Folder to write the samples' images to.")
@_json_option
def inspect(folder: str, ids: tuple[str, ...], step: int | None, epoch: int, save: str | None, as_json: bool) -> None:
    """Show samples of a corpus by their ids, or the samples of one step of a training run.

    An ID may be cut short. Shown are all columns, the image's place, whether its bytes are those that were ingested,
    and which stage dropped the sample, if one did.
    """
    from cl import console

    if (step is None) == (not ids):
        raise ConfigError("clew inspect takes ids of samples of a corpus, or a training run and --step; one of them.")
    if step is not None:
        _run("inspect", None, False, as_json, lambda: _load("pipelines.inspect:inspect_batch")(folder, epoch, step))
        return
    found = _load("pipelines.inspect:inspect_samples")(folder, ids, save)
    if as_json:
        console.print_json(found)
    else:
        for sample in found:
            console.print_result(sample.id, sample)


@cli.command(
    short_help="Check a corpus down to the bytes of its images.",
    epilog=_example("clew verify runs/curated", "clew verify runs/curated --deep --json"),
)
@click.argument("corpus", metavar="CORPUS")
@click.option("--deep", is_flag=True, help="Decode every image too.")
@click.option("--threads", type=click.IntRange(min=1), help="Fragments read at a time; by default one a core.")
@_json_option
def verify(corpus: str, deep: bool, threads: int | None, as_json: bool) -> None:
    """Check that a corpus is what its manifest says: counts, row groups, offsets, hashes, ids, lanes.

    One sentence a defect; exit code 1 if there is one.
    """
    from cl import console

    check = _load("pipelines.verify:verify")
    if as_json:
        with console.stdout_kept_for_json():
            result = check(corpus, deep, threads)
        console.print_json(result)
    else:
        result = check(corpus, deep, threads)
        console.print_result("clew verify", result)
    if result.defects:
        sys.exit(1)


@cli.command(
    short_help="Take samples out of corpora for good.",
    epilog=_example("clew remove --ids ids.txt runs/corpus runs/curated"),
)
@click.argument("corpora", nargs=-1, required=True, metavar="CORPUS...")
@click.option("--ids", required=True, help="Text file with the ids of the samples, one a line.")
@_json_option
def remove(corpora: tuple[str, ...], ids: str, as_json: bool) -> None:
    """Take samples out of corpora for good, by their ids.

    Only fragments and shards that hold one are rewritten. The ids stay with the corpus, and no later run brings the
    samples back. An interrupted removal is finished by the same command.
    """
    from cl import console

    results = _load("pipelines.remove:remove")(corpora, ids)
    if as_json:
        console.print_json(results)
    else:
        for result in results:
            console.print_result("clew remove", result)


@cli.command(
    short_help="Write the uids of a selection as a DataComp subset file.",
    epilog=_example(
        "clew subset runs/curated --out subset.npy",
        "clew subset metadata/ --out subset.npy --top clip_l14_similarity_score=0.3",
    ),
)
@click.argument("inputs", nargs=-1, required=True, metavar="CORPUS...|METADATA...")
@click.option("--out", required=True, help="The .npy file to write.")
@click.option("--min", "low", multiple=True, metavar="COLUMN=NUMBER", help="Of metadata: the lowest value allowed.")
@click.option("--max", "high", multiple=True, metavar="COLUMN=NUMBER", help="Of metadata: the highest value allowed.")
@click.option("--top", metavar="COLUMN=FRACTION", help="Of metadata: the fraction with the highest values.")
@_json_option
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
    _run("subset", None, False, as_json, lambda: _load("pipelines.datacomp:subset")(inputs, out, *bounds, best))


def _column_number(option: str, word: str) -> tuple[str, float]:
    """The two sides of COLUMN=NUMBER."""
    name, _, number = word.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise ConfigError(f"{option} {word!r} must have the form COLUMN=NUMBER.") from None


@cli.command(
    short_help="Make an HTML page of run folders.",
    epilog=_example("clew report runs/curated runs/model runs/eval --out runs/report.html"),
)
@click.argument("dirs", nargs=-1, required=True, metavar="DIR...")
@click.option("--out", required=True, help="The HTML file to write.")
@_json_option
def report(dirs: tuple[str, ...], out: str, as_json: bool) -> None:
    """Make one HTML page of one or more run folders; it needs no network to open."""
    _run("report", None, False, as_json, lambda: _load("pipelines.report.build:build_report")(list(dirs), out))


@cli.command(
    short_help="Run the whole job on the shipped corpus.",
    epilog=_example("clew demo", "clew demo --out /tmp/demo --json"),
)
@click.option("--out", default="runs/demo", show_default=True, help="Folder that the demo writes into.")
@_json_option
def demo(out: str, as_json: bool) -> None:
    """Run the whole job on the corpus that ships with Clew: ingest, curate, train, eval, sweep, report."""
    _run("demo", None, False, as_json, lambda: _load("cl.demo:demo")(out))


@cli.command(
    short_help="Say what is here and what would fail.",
    epilog=_example("clew doctor", "clew doctor --storage s3://bucket/runs --cluster --json"),
)
@click.option("--storage", default="runs", show_default=True, help="Folder or URL that runs write to.")
@click.option("--cluster", is_flag=True, help="Start or attach to Ray and look at every node.")
@_json_option
def doctor(storage: str, cluster: bool, as_json: bool) -> None:
    """Say what this machine or cluster has and what would fail; exit code 1 if something would."""
    from cl import console

    check = _load("cluster.doctor:examine")
    if as_json:
        with console.stdout_kept_for_json():
            rows = check(storage, cluster)
        console.print_json(rows)
    else:
        rows = check(storage, cluster)
        console.print_rows("clew doctor", console.plain(rows))
    if any(row.status == "fail" for row in rows):
        sys.exit(1)


def _list_command(name: str, help_text: str, rows: Callable[[], list[dict[str, str]]]) -> None:
    def callback(as_json: bool) -> None:
        from cl import console

        found = rows()
        if as_json:
            console.print_json(found)
        else:
            console.print_rows(f"{name} ({len(found)})", found)

    cli.command(
        name, short_help=help_text.split(":")[0], help=help_text, epilog=_example(f"clew {name}", f"clew {name} --json")
    )(_json_option(callback))


@cli.command(
    short_help="List the objectives that can be named, or show one.",
    epilog=_example("clew objectives", "clew objectives infonce", "clew objectives --json"),
)
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="Print the table of all objectives as Markdown.")
@_json_option
def objectives(name: str | None, markdown: bool, as_json: bool) -> None:
    """List the objectives that can be named; with a NAME, its formula and its parameters with their ranges."""
    from cl import console

    if markdown:
        click.echo(_load("cl.objectives.table:markdown")(), nl=False)
        return
    rows = _load("cl.objectives.table:parameter_rows")(name) if name else _load("cl.objectives.table:objective_rows")()
    if as_json:
        console.print_json(rows)
    elif name:
        click.echo(_load("cl.objectives.table:formula")(name) + "\n")
        console.print_rows(f"parameters of {name}", rows)
    else:
        shown = [{key: row[key] for key in ("name", "family", "summary", "needs", "paper")} for row in rows]
        console.print_rows(f"objectives ({len(rows)})", shown)


_list_command(
    "recipes",
    "List the shipped recipes: whole training configs, one a published method.",
    lambda: _load("cl.recipes:recipe_rows")(),
)
_list_command(
    "augmentations",
    "List the augmentations of images and texts that a view can name.",
    lambda: _load("cl.views.augmentation:AUGMENTATIONS").rows(),
)
_list_command(
    "stages",
    "List the stages of curation that can be named.",
    lambda: _load("pipelines.stages.registry:STAGES").rows(),
)
_list_command(
    "metrics",
    "List the metrics that can be named.",
    lambda: _load("cl.evaluation.registry:METRICS").rows(),
)


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _sentence(error: Exception) -> str | None:
    """The sentence for what the user can mend, or None for a defect of ours."""
    cause: BaseException | None = user_error(error)
    if cause is not None:
        return str(cause)
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"No space is left on the disk{f' of {cause.filename}' if cause.filename else ''}."
        if "No space left on device" in str(cause):  # libraries that are not written in Python say it in words
            return f"No space is left on the disk: {' '.join(str(cause).split())[:200]}"
        cause = cause.__cause__ or cause.__context__
    return None


def main(arguments: list[str] | None = None) -> None:
    """The entry point; exits with 0, 1 (a defect), 2 (the user can mend it), 130 (interrupted) or 143 (terminated)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        cli.main(arguments, prog_name="clew", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" See `{context.command_path} --help`." if context else ""
        _fail(f"{error.format_message()}{hint}")
    except (click.Abort, KeyboardInterrupt):
        again = shlex.join(["clew", *arguments])
        if arguments[:1] == ["train"] and "--resume" not in arguments:
            again += " --resume"
        click.echo(f"clew: interrupted. To go on from where it stopped: {again}", err=True)
        sys.exit(130)
    except ClewError as error:
        _fail(str(error))
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        _fail(sentence)


def _fail(sentence: str) -> NoReturn:
    click.echo(f"clew: {' '.join(sentence.split())}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
