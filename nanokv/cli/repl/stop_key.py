"""StopKey: the keyboard while a line is handled. Ctrl-C stops, other keys wait for the next prompt."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from nanokv.core.errors import RequestError

T = TypeVar("T")

SAME_GENERATION_S = 0.4
"""Seconds after a first Ctrl-C within which a second one leaves, even where the answer has stopped by then."""
LOOK_S = 0.05
"""Seconds between two looks at Ctrl-C during work that cannot be interrupted."""


class Stopped(RequestError):
    """Ctrl-C ended work before it had a result."""


class StopKey:
    """Ctrl-C inside a `with` block: the first sets `pressed`, the second ends the process with 130.

    The first takes effect between two engine steps, so that no step is interrupted. The second also works inside a
    long step, where no cleanup is possible: it ends the process at once.

    Typed text is not shown inside the block, where it would stand in the middle of an answer. The terminal keeps it
    for the next prompt.

    farewell   a line on stderr for a second Ctrl-C; none where it is empty
    """

    def __init__(self) -> None:
        self.pressed = False
        self.farewell = ""
        self._pressed_at = 0.0
        self._before: list[Any] = []
        self._echo: Callable[[], None] | None = None

    def __enter__(self) -> StopKey:
        self.pressed, self._echo = False, None
        self._before = [signal.signal(signal.SIGINT, self._on_interrupt), None]
        self._echo = hide_typing()  # after the handler: Ctrl-C from here on cannot leave the typing hidden
        if self._echo is not None:
            self._before[1] = signal.signal(signal.SIGTERM, self._on_terminate)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pressed and exception[0] is None:
            time.sleep(max(0.0, self._pressed_at + SAME_GENERATION_S - time.perf_counter()))
        self._restore()

    def run(self, work: Callable[[], T]) -> T:
        """work() in a thread of its own, so that Ctrl-C is heard while it holds on to C code. Returns its result.

        Raises Stopped at Ctrl-C. The work goes on then, and its result is dropped: it must change nothing.
        """
        result: list[T] = []
        failure: list[BaseException] = []

        def target() -> None:
            try:
                result.append(work())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        self.wait(lambda: not thread.is_alive(), thread.join)
        if failure:
            raise failure[0]
        return result[0]

    def wait(self, is_done: Callable[[], bool], look: Callable[[float], Any] = time.sleep) -> None:
        """Returns once is_done() holds. Raises Stopped at Ctrl-C.

        look   waits for the given seconds, or shorter
        """
        while not is_done():
            if self.pressed:
                raise Stopped("stopped before the answer began; the conversation is as it was")
            look(LOOK_S)

    def _restore(self) -> None:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), self._before, strict=True):
            if handler is not None:
                signal.signal(number, handler)
        if self._echo is not None:
            self._echo()

    def _on_interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self.pressed:
            if self._echo is not None:
                self._echo()
            os.write(2, f"\n{self.farewell}\n".encode() if self.farewell else b"\n")
            os._exit(130)
        self.pressed, self._pressed_at = True, time.perf_counter()

    def _on_terminate(self, _signal: int, _frame: FrameType | None) -> None:
        self._restore()
        signal.raise_signal(signal.SIGTERM)


def hide_typing() -> Callable[[], None] | None:
    """Stops the terminal of stdin from showing typed text. Returns the function that restores it; None without one."""
    try:
        import termios
    except ImportError:  # Windows
        return None
    try:
        descriptor = sys.stdin.fileno()
        if os.tcgetpgrp(descriptor) != os.getpgrp():  # the system would stop a process in the background
            return None
        before = termios.tcgetattr(descriptor)
    except (termios.error, AttributeError, OSError, ValueError):  # a pipe, a closed stdin
        return None
    hidden = list(before)
    hidden[3] &= ~(termios.ECHO | termios.ICANON)  # with ICANON the line being typed stays out of the next prompt
    termios.tcsetattr(descriptor, termios.TCSADRAIN, hidden)
    return lambda: termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
