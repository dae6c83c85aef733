"""nanokv: the command group. Imports a command's file when that command is called; turns errors into one line."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

import nanokv
from nanokv.core.errors import NanokvError
from nanokv.core.spin import bound_spins

bound_spins()  # before a command imports torch

COMMANDS = {
    "chat": "Chat with a model in this terminal, or answer one prompt.",
    "pull": "Fetch a model, once.",
    "size": "Show the cost of a model's cache, from its config alone.",
    "bench": "Measure this engine on this machine.",
    "disagg": "Compute prompts for an engine on another host.",
    "learn": "Write parts of this engine yourself, with checks.",
}
"""Name -> line of help. Command NAME is the function NAME of nanokv.cli.NAME."""


class Nanokv(click.Group):
    """A group that imports a command on use, so that `nanokv --help` imports nothing heavy.

    Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted. `--debug`, before or after the command's name,
    shows the traceback of an error.
    """

    debug = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(import_module(f"nanokv.cli.{name}"), name)
        _add_debug(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs a command line and exits with its code; an error is one line on stderr."""
        self.debug = False
        if logging.lastResort is not None:
            logging.lastResort.addFilter(is_wanted)
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name or "nanokv", complete_var, standalone_mode=False, **extra)
        except click.Abort as abort:  # click raises it for Ctrl-C
            code = 130 if isinstance(abort.__cause__, KeyboardInterrupt) else 1
        except KeyboardInterrupt:
            code = 130
        except BrokenPipeError:  # the reader of stdout closed it, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except click.exceptions.NoArgsIsHelpError as error:  # a group without a command shows its help
            error.show()
            code = 2
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx is not None else "nanokv"
            code = self._fail(f"{path}: {error.format_message()} (see {path} --help)", 2)
        except (NanokvError, OSError, click.ClickException) as error:
            code = self._fail(f"nanokv: {error}", 1)
        except Exception as error:
            code = self._fail(f"nanokv: unexpected {type(error).__name__}: {error} (--debug shows where)", 1)
        sys.exit(code if isinstance(code, int) else 0)

    def _fail(self, message: str, code: int) -> int:
        if self.debug:
            traceback.print_exc()
        click.echo(" ".join(message.split()), err=True)
        return code


def is_wanted(record: logging.LogRecord) -> bool:
    """Whether a log record is shown. One with a traceback only with --debug: the command's own line names the error."""
    return main.debug or record.exc_info is None


def _set_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    main.debug |= value


_debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_set_debug,
    help="Show the traceback of an error.",
)  # fmt: skip


def _add_debug(command: click.Command) -> None:
    """Accepts --debug after the command's name too."""
    if not any(parameter.name == "debug" for parameter in command.params):
        _debug_option(command)
    if isinstance(command, click.Group):
        for sub in command.commands.values():
            _add_debug(sub)


@click.group("nanokv", cls=Nanokv, epilog="Example: nanokv chat -p 'What is the capital of France?'")
@click.version_option(nanokv.__version__, message="nanokv %(version)s")
@_debug_option
def main() -> None:
    """An LLM inference engine small enough to read, whose subject is the KV cache."""


if __name__ == "__main__":
    main()
