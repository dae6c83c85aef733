"""Ticket: one request that was submitted to an EngineLoop (loop.py), and the outputs that wait in its inbox."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

from nanokv.core.request import Request, RequestOutput


class Inbox:
    """The outputs of one request that its ticket has not returned yet. Holds no ticket: dropping a ticket cancels.
    A `sink` takes the outputs instead, in the thread that steps; it must not raise."""

    def __init__(self, sink: Callable[[RequestOutput], None] | None = None) -> None:
        self.outputs: deque[RequestOutput] = deque()
        self._take = sink or self.outputs.append
        self.num_samples = 0
        self._ended: set[int] = set()

    def put(self, output: RequestOutput) -> None:
        """Takes an output of the engine: the sink of the request. The last output of a sample may be repeated."""
        if output.index not in self._ended:
            self._take(output)
            if output.finished:
                self._ended.add(output.index)

    @property
    def num_running(self) -> int:
        """Samples that have not ended."""
        return self.num_samples - len(self._ended)

    @property
    def is_open(self) -> bool:
        """Whether there is an output, or one will come."""
        return self.num_running > 0 or bool(self.outputs)

    @property
    def needs_step(self) -> bool:
        """Whether the next output takes a step."""
        return self.num_running > 0 and not self.outputs


class Ticket:
    """One submitted request: an iterator over its outputs, which ends after the last one.

    Closing or dropping a ticket cancels its request, if that is still live.
    """

    def __init__(
        self, request: Request, inbox: Inbox, advance: Callable[[Inbox], bool], cancel: Callable[[Request, Inbox], None]
    ) -> None:
        self.request = request
        self.request_id = request.id
        self._inbox = inbox
        self._advance = advance
        self._cancel = cancel

    def __iter__(self) -> Ticket:
        return self

    def __next__(self) -> RequestOutput:
        inbox = self._inbox
        while True:
            with suppress(IndexError):  # another thread may take the output that is there
                return inbox.outputs.popleft()
            if not self._advance(inbox):
                raise StopIteration

    def advance(self) -> bool:
        """One step of the engine, or a short wait for the thread, if there is no output yet. False after the last."""
        return self._advance(self._inbox)

    def take(self) -> list[RequestOutput]:
        """The outputs that are there, without a step."""
        outputs = self._inbox.outputs
        return [outputs.popleft() for _ in range(len(outputs))]

    def cancel(self) -> None:
        """Aborts the request between two steps, if it is still live. The iterator goes on to its last output."""
        self._cancel(self.request, self._inbox)

    def close(self) -> None:
        """Cancels, and drops the outputs."""
        self.cancel()
        self._inbox = Inbox()

    def __del__(self) -> None:
        if hasattr(self, "_cancel"):  # set last: an interrupt may have ended the constructor
            self.cancel()
