"""What is there: the machine, and everything that a config can name."""

from __future__ import annotations

import sys
from collections.abc import Callable

import click

from cl.commands.base import cli, example, json_option, load, run


@cli.command(
    short_help="Say what is here and what would fail.",
    epilog=example("clew doctor", "clew doctor --storage s3://bucket/runs --cluster --json"),
)
@click.option("--storage", default="runs", show_default=True, help="Folder or URL that runs write to.")
@click.option("--cluster", is_flag=True, help="Start or attach to Ray and look at every node.")
@json_option
def doctor(storage: str, cluster: bool, as_json: bool) -> None:
    """Say what this machine or cluster has and what would fail; exit code 1 if something would."""
    from cl import console

    rows = run(
        "clew doctor",
        as_json,
        lambda: load("cluster.doctor:examine")(storage, cluster),
        lambda found: console.print_rows("clew doctor", console.plain(found)),
    )
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
        name, short_help=help_text.split(":")[0], help=help_text, epilog=example(f"clew {name}", f"clew {name} --json")
    )(json_option(callback))


@cli.command(
    short_help="List the objectives that can be named, or show one.",
    epilog=example("clew objectives", "clew objectives infonce", "clew objectives --json"),
)
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="Print the table of all objectives as Markdown.")
@json_option
def objectives(name: str | None, markdown: bool, as_json: bool) -> None:
    """List the objectives that can be named; with a NAME, its formula and its parameters with their ranges."""
    from cl import console

    if markdown:
        click.echo(load("cl.objectives.table:markdown")(), nl=False)
        return
    rows = load("cl.objectives.table:parameter_rows")(name) if name else load("cl.objectives.table:objective_rows")()
    if as_json:
        console.print_json(rows)
    elif name:
        click.echo(load("cl.objectives.table:formula")(name) + "\n")
        console.print_rows(f"parameters of {name}", rows)
    else:
        shown = [{key: row[key] for key in ("name", "family", "summary", "needs", "paper")} for row in rows]
        console.print_rows(f"objectives ({len(rows)})", shown)


_list_command(
    "recipes",
    "List the shipped recipes: whole training configs, one a published method.",
    lambda: load("cl.recipes:recipe_rows")(),
)
_list_command(
    "augmentations",
    "List the augmentations of images and texts that a view can name.",
    lambda: load("cl.views.augmentation:AUGMENTATIONS").rows(),
)
_list_command(
    "arrangements",
    "List the arrangements that deal the samples of several steps out among them.",
    lambda: load("cl.batches.arrangements:ARRANGEMENTS").rows(),
)
_list_command(
    "stages",
    "List the stages of curation that can be named.",
    lambda: load("pipelines.stages.registry:STAGES").rows(),
)
_list_command(
    "metrics",
    "List the metrics that can be named.",
    lambda: load("cl.evaluation.registry:METRICS").rows(),
)
