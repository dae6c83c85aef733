"""Slash commands: finding one and running it, the Tab key, help. An unknown command is an error, never a message."""

from __future__ import annotations

import glob
import os

from nanokv.cli.repl import settings
from nanokv.cli.repl.registry import COMMANDS, Chat, Command, command

# isort: off
from nanokv.cli.repl import setting_commands, turn_commands, file_commands, engine_commands  # in the order of /?

# isort: on
from nanokv.core.errors import RequestError

__all__ = ["COMMANDS", "completions", "engine_commands", "file_commands", "run_command", "turn_commands"]


def run_command(chat: Chat, line: str) -> None:
    """Runs one line that begins with a slash. Raises RequestError for an unknown command or an invalid argument."""
    name, *argument = line.split(maxsplit=1)
    _known(name).run(chat, argument[0].rstrip() if argument else "")


def completions(line: str) -> list[str]:
    """The lines that complete `line`, for the Tab key."""
    name, space, argument = line.partition(" ")
    if not space:
        return sorted(known for known in COMMANDS if known.startswith(name)) if name.startswith("/") else []
    if name in ("/read", "/load", "/save", "/save!"):
        paths = sorted(glob.glob(glob.escape(os.path.expanduser(argument)) + "*"))
        return [f"{name} {path}{'/' if os.path.isdir(path) else ''}" for path in paths]
    known = {
        "/set": [*settings.SETTINGS, "system"],
        "/show": list(setting_commands.SHOWN),
        "/stats": ["on", "off"],
    }
    return [f"{name} {word}" for word in known.get(name, []) if word.startswith(argument)]


def _known(name: str) -> Command:
    from difflib import get_close_matches

    if name in COMMANDS:
        return COMMANDS[name]
    near = get_close_matches(name, COMMANDS, n=1, cutoff=0.5) if len(name) > 2 else []
    hint = f"; did you mean {near[0]}?" if near else ""
    raise RequestError(f"unknown command {name}{hint} (/? lists them, /{name} sends it as text)")


_KEYS = '''\
  """                 begins and ends a message of several lines
  //TEXT              sends text that begins with a slash
  Ctrl-C              at the prompt: drops the line; in an answer: stops it,
                      keeps its text, and twice within it: leaves
  Ctrl-D              leaves; inside """: drops the message'''


@command("/? [COMMAND]", "list the commands, or explain one", "/help")
def _help(chat: Chat, argument: str) -> None:
    if argument:
        known = _known(argument if argument.startswith("/") else f"/{argument}")
        chat.terminal.line(f"{known.usage}    {known.summary}")
        if known.details:
            chat.terminal.line(known.details)
        return
    for known in dict.fromkeys(COMMANDS.values()):
        names = [name for name, one in COMMANDS.items() if one is known]
        others = f" (also {', '.join(names[1:])})" if len(names) > 1 else ""
        chat.terminal.line(f"  {known.usage:20}{known.summary}{others}")
    chat.terminal.line(_KEYS)


@command("/bye", "leave", "/exit", "/quit")
def _bye(chat: Chat, _argument: str) -> None:
    chat.leaving = True
