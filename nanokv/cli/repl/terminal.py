"""Terminal: the output of a chat. Answers go to stdout, notes and errors to stderr, colour only to a terminal."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from nanokv.cli.repl.wrapping import WordWrap, wrapped

DIM, RED, RESET, ERASE_LINE = "\x1b[2m", "\x1b[31m", "\x1b[0m", "\r\x1b[K"
REDRAW_S = 0.1
"""Seconds between two drawings of the line of `busy`."""

# A model that prints an escape sequence must not be able to drive the reader's terminal.
_CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")


class Terminal:
    """Writes to two streams. Output is appended and never redrawn, except by `busy`.

    out, err   text streams; the process's own by default
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = sys.stdout if out is None else out
        self.err = sys.stderr if err is None else err
        self._wrap = WordWrap()
        self._lock = threading.RLock()  # of the line of `busy`, which a thread draws
        self._drawn = ""
        self._is_hidden = False
        for stream in (self.out, self.err):
            if hasattr(stream, "reconfigure"):  # a character that the stream cannot encode must not end the chat
                stream.reconfigure(errors="replace")

    def say(self, text: str) -> None:
        """Writes a piece of an answer and flushes it. On a terminal its last word appears once it is complete."""
        if self.out.isatty():
            text = self._wrap.feed(printable(text), columns_of(self.out))
        self._write(self.out, text)

    def end_answer(self, end: str = "\n") -> None:
        """Writes the rest of an answer, and `end` after it."""
        rest = self._wrap.rest(columns_of(self.out)) if self.out.isatty() else ""
        self._wrap = WordWrap()
        self._write(self.out, rest + end)

    def line(self, text: str = "") -> None:
        """Writes a line of requested output (`/show`, `/cache`)."""
        self._write(self.out, _fitted(text, self.out) + "\n")

    def note(self, text: str) -> None:
        """Writes a remark: one dim line on stderr."""
        self._error_line(text, DIM)

    def error(self, text: str) -> None:
        """Writes an error: one line on stderr."""
        self._error_line(f"error: {text}", RED)

    @contextmanager
    def busy(self, text: Callable[[], str]) -> Iterator[None]:
        """Shows `text()` on stderr until the block ends or an answer begins, drawn again as it changes.

        Does nothing where `err` takes no escape codes.
        """
        if not wants_colour(self.err):
            yield
            return
        self._is_hidden, done = False, threading.Event()

        def draw() -> None:
            while not done.is_set():
                with self._lock:
                    line = "" if self._is_hidden else text()[: columns_of(self.err) - 1]
                    if line != self._drawn:
                        self.err.write(ERASE_LINE + (f"{DIM}{line}{RESET}" if line else ""))
                        self.err.flush()
                        self._drawn = line
                done.wait(REDRAW_S)

        drawing = threading.Thread(target=draw, name="busy", daemon=True)
        drawing.start()
        try:
            yield
        finally:
            done.set()
            drawing.join()
            self._erase()

    def _erase(self) -> None:
        with self._lock:
            if self._drawn:
                self.err.write(ERASE_LINE)
                self.err.flush()
                self._drawn = ""

    def _write(self, stream: TextIO, text: str) -> None:
        if not text:
            return
        with self._lock:
            self._is_hidden = self._is_hidden or stream is self.out
            self._erase()
            stream.write(text)
            stream.flush()

    def _error_line(self, text: str, style: str) -> None:
        self.out.flush()
        self._write(self.err, styled(_fitted(text, self.err), style, self.err) + "\n")


def wants_colour(stream: TextIO) -> bool:
    """Whether `stream` takes escape codes: a terminal, not TERM=dumb, no NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: TextIO) -> str:
    """`text` in `style` where `stream` takes escape codes, else unchanged."""
    return f"{style}{text}{RESET}" if wants_colour(stream) else text


def printable(text: str) -> str:
    """`text` with control characters, except newline and tab, replaced by U+FFFD."""
    return text.translate(_CONTROLS)


def columns_of(stream: TextIO) -> int:
    """Columns of the terminal behind a stream; 80 where it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):  # no descriptor, or it is no terminal
        return 80


def _fitted(text: str, stream: TextIO) -> str:
    """`text` as a terminal shows it: without control characters, broken between words. Unchanged elsewhere."""
    return wrapped(printable(text), columns_of(stream)) if stream.isatty() else text
