"""`clew`: one command a job.

    clew CMD [CONFIG] [field=value ...] [--json] [--print-config]

The commands are in `cl.commands`; this file says how they end. What the user can mend is said in one sentence on
stderr, with exit code 2 and no traceback; an interrupted command exits with 130 and says how to go on.
"""

from __future__ import annotations

import errno
import shlex
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from cl.commands.base import cli
from cl.errors import ClewError, user_error

# Each module adds its commands, in the order of a user's work.
# isort: off
from cl.commands import jobs, imports, corpora, bench, listings
# isort: on

__all__ = ["bench", "cli", "corpora", "imports", "jobs", "listings", "main"]


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
