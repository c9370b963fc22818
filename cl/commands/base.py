"""What the commands of `clew` are made of: the group, common options, and how a result is printed.

Nothing heavy is imported until a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable
from typing import Any

import click

from cl import __version__
from cl.errors import ConfigError


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


def load(target: str) -> Any:
    """The object behind "module:name"."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    function = click.option("--json", "as_json", is_flag=True, help="Print only JSON on stdout.")(function)
    return click.option("--print-config", is_flag=True, help="Print the resolved config and exit.")(function)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print only JSON on stdout.")(function)


def example(*lines: str) -> str:
    return "\b\n" + "\n".join(["Example:", *(f"  {line}" for line in lines)])


def split(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Names (paths, configs) and overrides among the words; a file that exists is a name even with "=" in it."""
    from cl.config import is_override

    overrides = [word for word in words if is_override(word) and not os.path.exists(word)]
    return [word for word in words if word not in overrides], overrides


def run(title: str, as_json: bool, job: Callable[[], Any], show: Callable[[Any], None] | None = None) -> Any:
    """Do a job, print its result and return it.

    Args:
        title: above the result.
        as_json: stdout gets JSON and nothing else, whatever the job prints.
        job: gives the result, or a list of them.
        show: prints a result for people in its own way.
    """
    from cl import console

    if as_json:
        with console.stdout_kept_for_json():
            result = job()
        console.print_json(result)
        return result
    result = job()
    if show is not None:
        show(result)
    else:
        for each in result if isinstance(result, list) else [result]:
            console.print_result(title, each)
    return result


def run_config(command: str, config: Any, print_config: bool, as_json: bool, job: Callable[[], Any]) -> None:
    """Print the resolved config, or do the job."""
    if not print_config:
        run(f"clew {command}", as_json, job)
    elif as_json:
        from cl import console

        console.print_json(config)
    else:
        from cl.config import dump_config

        click.echo(dump_config(config), nl=False)
