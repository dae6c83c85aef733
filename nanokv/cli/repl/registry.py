"""The table of slash commands: a command is a small function over a chat, registered under its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nanokv.core.errors import RequestError

if TYPE_CHECKING:
    from nanokv.cli.repl.stop_key import StopKey
    from nanokv.cli.repl.terminal import Terminal
    from nanokv.core.request import SamplingParams
    from nanokv.llm import LLM
    from nanokv.text.conversation import Conversation


class Chat(Protocol):
    """The chat that a command acts on. `ChatSession` documents the members."""

    llm: LLM
    model: str
    terminal: Terminal
    conversation: Conversation
    params: SamplingParams
    defaults: SamplingParams
    attached: list[tuple[Path, str]]
    stop: StopKey
    show_stats: bool
    leaving: bool

    @property
    def room(self) -> int: ...
    def answer_again(self) -> None: ...


Run = Callable[[Chat, str], None]


@dataclass(frozen=True)
class Command:
    """One command. `run` takes the chat and the text after the name; a RequestError becomes one error line."""

    run: Run
    usage: str
    summary: str

    @property
    def details(self) -> str:
        """The text of `/? COMMAND` below the summary, from the docstring of `run`."""
        return "\n".join(line.strip() for line in (self.run.__doc__ or "").splitlines()).strip()


COMMANDS: dict[str, Command] = {}
"""By name, aliases included."""


def command(usage: str, summary: str, *aliases: str) -> Callable[[Run], Run]:
    """Registers a function as the command that `usage` begins with. Without an argument in `usage` it takes none."""
    name, *arguments = usage.split()

    def register(function: Run) -> Run:
        def run(chat: Chat, argument: str) -> None:
            if argument and not arguments:
                raise RequestError(f"{name} {argument}: {name} takes no argument")
            function(chat, argument)

        run.__doc__ = function.__doc__
        COMMANDS.update(dict.fromkeys((name, *aliases), Command(run, usage, summary)))
        return function

    return register
