"""Interrupts: Ctrl-C arrives where it can break nothing: between turns of the engine, and inside a forward pass."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupts:
    """Delays KeyboardInterrupt while an engine changes its books. Python runs signal handlers in the main thread only.

    in_forward   a forward pass runs, or an interrupt has ended it: the books are right then, and the tokens lost
    """

    def __init__(self) -> None:
        self.in_forward = False
        self._is_deferred = False
        self._is_pending = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Ctrl-C waits until this ends; a second one does not wait. A program's own handler of SIGINT is left alone."""
        handler = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or handler is not signal.default_int_handler:
            yield
            return
        self._is_deferred, self._is_pending, self.in_forward = True, False, False
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)  # while interrupts still wait, so that none keeps it away
            self._is_deferred = False
            if self._is_pending:
                self._is_pending = False
                raise KeyboardInterrupt

    def forget(self) -> None:
        """In a forked child: another thread may have forked in the middle of a turn of the main thread."""
        self._is_deferred = self._is_pending = self.in_forward = False
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """The part of a turn in which Ctrl-C need not wait: it may take seconds, and changes no books."""
        was_deferred, self._is_deferred, self.in_forward = self._is_deferred, False, True
        if self._is_pending:
            self._is_pending = False
            raise KeyboardInterrupt
        try:
            yield
        except Exception:
            self._is_deferred, self.in_forward = was_deferred, False
            raise
        self._is_deferred, self.in_forward = was_deferred, False

    def _handle(self, *_: object) -> None:
        if not self._is_deferred or self._is_pending:
            self._is_pending = False
            raise KeyboardInterrupt
        self._is_pending = True
