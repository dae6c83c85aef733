"""Terminal: the output of a chat. Answers go to stdout, notes and errors to stderr, colour only to a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

DIM, RED, RESET, ERASE_LINE = "\x1b[2m", "\x1b[31m", "\x1b[0m", "\r\x1b[K"

# A model that prints an escape sequence must not be able to drive the reader's terminal.
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")


class Terminal:
    """Writes to two streams. Output is appended and never redrawn, except by `busy`.

    out, err   text streams; the process's own by default
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = sys.stdout if out is None else out
        self.err = sys.stderr if err is None else err
        for stream in (self.out, self.err):
            if hasattr(stream, "reconfigure"):  # a character that the stream cannot encode must not end the chat
                stream.reconfigure(errors="replace")

    def say(self, text: str) -> None:
        """Writes a piece of an answer and flushes it."""
        self.out.write(printable(text) if self.out.isatty() else text)
        self.out.flush()

    def line(self, text: str = "") -> None:
        """Writes a line of requested output (`/show`, `/cache`)."""
        self.out.write(text + "\n")
        self.out.flush()

    def note(self, text: str) -> None:
        """Writes a remark: one dim line on stderr."""
        self._error_line(styled(text, DIM, self.err))

    def error(self, text: str) -> None:
        """Writes an error: one line on stderr."""
        self._error_line(styled(f"error: {text}", RED, self.err))

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Shows `text` on stderr during the block, then erases it. Does nothing where `err` takes no escape codes."""
        if not wants_colour(self.err):
            yield
            return
        self.err.write(f"{DIM}{text}{RESET}")
        self.err.flush()
        try:
            yield
        finally:
            self.err.write(ERASE_LINE)
            self.err.flush()

    def _error_line(self, text: str) -> None:
        self.out.flush()
        self.err.write(text + "\n")
        self.err.flush()


def wants_colour(stream: TextIO) -> bool:
    """Whether `stream` takes escape codes: a terminal, not TERM=dumb, no NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: TextIO) -> str:
    """`text` in `style` where `stream` takes escape codes, else unchanged."""
    return f"{style}{text}{RESET}" if wants_colour(stream) else text


def printable(text: str) -> str:
    """`text` with control characters, except newline and tab, replaced by U+FFFD."""
    return text.translate(_CONTROLS)
