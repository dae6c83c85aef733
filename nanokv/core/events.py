"""Events: typed records of changes to pages and requests, and the subscribers that receive them.

Subscribers are functions; the JSONL log (event_log.py) is one of them. Without a subscriber `Events` is false, and no
event is created:

    if events:
        events.emit(Preempted(request.id, request.index))

The subclasses of Event are the list of all events.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

logger = logging.getLogger("nanokv")


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. `name` is the event's name in the log."""

    name: ClassVar[str]


@dataclass(frozen=True, slots=True)
class RequestAdded(Event):
    """A request was queued. n: the number of its samples."""

    name = "request"
    request: str
    prompt_tokens: int
    n: int


@dataclass(frozen=True, slots=True)
class PageEvent(Event):
    """Base of the events of pages. `request` and `index` (of the sample) are None where no request is the cause."""

    request: str | None
    index: int | None
    pages: list[int]


class Matched(PageEvent):
    """A request was admitted and holds these cached pages."""

    name = "match"


class Allocated(PageEvent):
    """A request received free pages."""

    name = "alloc"


class Shared(PageEvent):
    """A forked sample shares these pages with its parent."""

    name = "share"


class Copied(PageEvent):
    """A shared page was copied before a write: pages = [source, destination]."""

    name = "copy"


class Published(PageEvent):
    """Full pages of a request entered the prefix tree, or were found there."""

    name = "publish"


class Evicted(PageEvent):
    """Cached pages were dropped to make room."""

    name = "evict"


class Freed(PageEvent):
    """Pages became free."""

    name = "free"


class TransferStarted(PageEvent):
    """A transfer began: until it ends, a connector may write into the request's pages."""

    name = "transfer"


@dataclass(frozen=True, slots=True)
class Preempted(Event):
    """A running request went back to the queue."""

    name = "preempt"
    request: str
    index: int


@dataclass(frozen=True, slots=True)
class StepLaunched(Event):
    """A step was dispatched. requests: (id, index, tokens) of each; copies, state_copies: (source, destination)."""

    name = "step"
    number: int
    tokens: int
    requests: list[tuple[str, int, int]]
    copies: list[tuple[int, int]]
    state_copies: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """A sample ended."""

    name = "finish"
    request: str
    index: int
    reason: str


Subscriber = Callable[[Event], None]
"""Receives each event, in the thread of the engine and often inside a step: it may not call the engine."""


class Events:
    """The stream of events of one engine."""

    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []

    def __bool__(self) -> bool:
        """Whether there is a subscriber; callers create no event otherwise."""
        return bool(self._subscribers)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Calls `subscriber` with each event from now on. Returns the function that ends the subscription."""
        self._subscribers.append(subscriber)
        return lambda: self._unsubscribe(subscriber)

    def emit(self, event: Event) -> None:
        """Calls every subscriber with the event. A subscriber that raises is removed with a warning."""
        for subscriber in tuple(self._subscribers):
            try:
                subscriber(event)
            except Exception as error:
                logger.warning("a subscriber of events ends here: %s", error)
                self._unsubscribe(subscriber)

    def _unsubscribe(self, subscriber: Subscriber) -> None:
        if subscriber in self._subscribers:
            self._subscribers.remove(subscriber)
