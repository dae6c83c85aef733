"""Events: one record for each thing that happens to a page or a request, and the subscribers that read them.

Subscribers are functions; the JSONL log (event_log.py) is one of them. Without a subscriber `Events` is false and an
event is not even made:

    if events:
        events.emit(Preempted(request.request_id, request.index))

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
    """Base of all events. `name` is what the log calls it."""

    name: ClassVar[str]


@dataclass(frozen=True, slots=True)
class RequestAdded(Event):
    """A request was queued."""

    name = "request"
    request: str
    prompt_tokens: int
    n: int


@dataclass(frozen=True, slots=True)
class PageEvent(Event):
    """Something happened to pages. request and index are None where no request is the cause."""

    request: str | None
    index: int | None
    pages: list[int]


class Matched(PageEvent):
    """The prefix cache gave a request these pages."""

    name = "match"


class Allocated(PageEvent):
    """A request took free pages."""

    name = "alloc"


class Shared(PageEvent):
    """A forked sample shares these pages with its parent."""

    name = "share"


class Copied(PageEvent):
    """A shared page was copied before a write: pages = [source, destination]."""

    name = "copy"


class Published(PageEvent):
    """Full pages of a request stand in the prefix tree."""

    name = "publish"


class Evicted(PageEvent):
    """Cached pages were dropped for room."""

    name = "evict"


class Freed(PageEvent):
    """Pages became free."""

    name = "free"


class TransferStarted(PageEvent):
    """A connector may write into a request's pages from here on."""

    name = "transfer"


@dataclass(frozen=True, slots=True)
class Preempted(Event):
    """A running request went back to the queue."""

    name = "preempt"
    request: str
    index: int


@dataclass(frozen=True, slots=True)
class StepLaunched(Event):
    """A step was dispatched. requests: [id, index, tokens] of each; copies: (source, destination)."""

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


class Events:
    """The stream of events of one engine."""

    def __init__(self) -> None:
        self._subscribers: list[Subscriber] = []

    def __bool__(self) -> bool:
        """Whether anything listens; callers make no event otherwise."""
        return bool(self._subscribers)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Calls `subscriber` with each event from now on, in the thread of the engine. Returns what ends that."""
        self._subscribers.append(subscriber)

        def unsubscribe() -> None:
            if subscriber in self._subscribers:
                self._subscribers.remove(subscriber)

        return unsubscribe

    def emit(self, event: Event) -> None:
        """Hands the event to every subscriber. One that raises is removed with a warning: the engine goes on."""
        for subscriber in tuple(self._subscribers):
            try:
                subscriber(event)
            except Exception as error:
                logger.warning("a subscriber of events ends here: %s", error)
                self._subscribers.remove(subscriber)
