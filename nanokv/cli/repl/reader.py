"""LineReader: typed messages, one at a time, with line editing, a history file and `\"\"\"` blocks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from nanokv.cli.repl.terminal import wants_colour

PROMPT, CONTINUED = ">>> ", "... "
QUOTES = '"""'
HISTORY_LINES = 1000


class LineReader:
    """Reads from the terminal with GNU readline where Python has it.

    complete   takes the beginning of a line, returns its completions (Tab)
    on_error   called once, with one line, where the history file cannot be used; the chat continues without it
    """

    def __init__(self, complete: Callable[[str], list[str]], on_error: Callable[[str], None]) -> None:
        self._readline = _import_readline()
        self._on_error = on_error
        self._history: Path | None = None
        self._begun = False
        if self._readline is None:
            return
        self._complete = complete
        self._readline.set_completer(self._candidate)
        self._readline.set_completer_delims("")
        self._readline.parse_and_bind("tab: complete")
        if sys.stdout.isatty():  # pasted text of several lines is one message; NO_COLOR says nothing about that
            self._readline.parse_and_bind("set enable-bracketed-paste on")
            if not wants_colour(sys.stdout):
                self._readline.parse_and_bind("set enable-active-region off")  # pasted text in reverse video
        if not os.environ.get("NANOKV_NOHISTORY"):
            self._open_history(history_path())

    def read(self) -> str | None:
        """The next message, the lines of a `\"\"\"` block joined; None at the end of input (Ctrl-D).

        Raises KeyboardInterrupt at Ctrl-C; `pending` then says whether the message had begun.
        """
        self._begun = False
        try:
            message = self._input(PROMPT)
            while _is_open(message):
                self._begun = True
                message = f"{message}\n{self._input(CONTINUED)}"
        except EOFError:
            if self._begun:  # inside a block, Ctrl-D acts as Ctrl-C: leaving would lose the typed lines
                _forget_end_of_input()
                raise KeyboardInterrupt from None
            return None
        return _without_quotes(message)

    @property
    def pending(self) -> bool:
        """Whether the message that Ctrl-C interrupted had begun."""
        return self._begun or (self._readline is not None and bool(self._readline.get_line_buffer()))

    def _input(self, prompt: str) -> str:
        line = input(prompt)
        if self._history is not None and line.strip():
            try:
                self._readline.append_history_file(1, self._history)
            except OSError as error:
                self._history = None
                self._on_error(f"history is off: {error.filename or history_path()}: {error.strerror}")
        return line

    def _open_history(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
            path.chmod(0o600)
            self._readline.set_history_length(HISTORY_LINES)
            self._readline.read_history_file(path)
            self._history = path
        except OSError as error:
            self._on_error(f"history is off: {path}: {error.strerror}")

    def _candidate(self, text: str, state: int) -> str | None:
        words = self._complete(text)
        return words[state] if state < len(words) else None


def history_path() -> Path:
    """Path of the history: $XDG_STATE_HOME/nanokv/history, by default ~/.local/state/nanokv/history."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "nanokv" / "history"


def _import_readline():
    try:
        import readline
    except ImportError:  # on Windows and in a Python built without it: plain input, no history
        return None
    return readline


def _forget_end_of_input() -> None:
    """Without this, GNU readline follows every later line with an empty one: the interface that Python uses never
    resets its mark of a Ctrl-D."""
    try:
        import ctypes
        import readline

        ctypes.c_int.in_dll(ctypes.CDLL(readline.__file__), "rl_eof_found").value = 0
    except (ImportError, AttributeError, OSError, TypeError, ValueError):
        pass  # another line editor, without such a mark


def _is_open(message: str) -> bool:
    """Whether the message opens a block, at its start or after a command, and no later line ends with `\"\"\"`."""
    head, quotes, rest = message.partition(QUOTES)
    return bool(quotes) and _may_open(head) and not rest.rstrip().endswith(QUOTES)


def _may_open(head: str) -> bool:
    return not head.strip() or head.startswith("/")


def _without_quotes(message: str) -> str:
    """The message without the quotes around its block. Text that merely contains quotes stays unchanged.

    A block is a message for the model even where it begins with a slash, so that slash is doubled.
    """
    head, quotes, rest = message.partition(QUOTES)
    if not quotes or not _may_open(head):
        return message
    body = rest.rstrip().removesuffix(QUOTES).removeprefix("\n").removesuffix("\n")
    return f"/{body}" if not head.strip() and body.startswith("/") else head + body
