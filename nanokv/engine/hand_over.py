"""Requests on their way to another process, and back. Between the two they are out of the house (remote.py)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from nanokv.cache.manager import CacheManager
from nanokv.core.events import EventLog
from nanokv.core.request import Request
from nanokv.engine.live import LiveRequests
from nanokv.engine.remote import Prefilled, Prefiller
from nanokv.engine.scheduler import Scheduler

Fail = Callable[[Iterable[Request], Exception], None]
"""Ends requests with an error."""


def hand_over(remote: list[Request], prefiller: Prefiller, cache: CacheManager, events: EventLog, fail: Fail) -> None:
    """Gives requests away with their pages and states, whose copies have been made; takes them out of the list."""
    while remote:
        request = remote[0]
        request.metrics.first_scheduled = request.metrics.first_scheduled or time.perf_counter()
        try:
            prefiller.start(request, cache.lend(request))
        except Exception as error:
            fail([request], error)
        remote.pop(0)
        if events.on and request.finish_reason is None:
            events.write("hand_over", request=request.request_id, pages=list(request.pages))


def take_back(
    arrived: deque[Prefilled], scheduler: Scheduler, cache: CacheManager, live: LiveRequests, fail: Fail
) -> None:
    """What another process has computed joins the batch; what it has lost is computed again. One after the other is
    taken out of `arrived`, so that an error or Ctrl-C loses none behind it."""
    while arrived:
        request = arrived[0].request
        try:
            _join(arrived[0], scheduler, cache, live)
        except Exception as error:
            fail([request], error)
        except BaseException:  # Ctrl-C in the middle of it: computed again, or let go where nobody waits for it
            if request.finish_reason is not None:
                if request in scheduler.running:
                    scheduler.remove(request)
                cache.release(request)
            for one in reversed(live.of([request])):
                if one in scheduler.running:
                    scheduler.preempt(one)
            raise
        finally:
            arrived.popleft()


def _join(back: Prefilled, scheduler: Scheduler, cache: CacheManager, live: LiveRequests) -> None:
    request = back.request
    request.is_remote = False
    if request.finish_reason is not None:  # aborted meanwhile: now its pages are free
        scheduler.remove(request)
    elif back.tokens is None:
        scheduler.preempt(request)
    elif None in back.tokens:  # and its pages are published to nobody
        live.append(request, None, None, time.perf_counter())
    else:
        cache.adopt(request)
        siblings, now = live.siblings(request), time.perf_counter()
        live.fork(request, siblings)
        for sample, token, scores in zip([request, *siblings], back.tokens, back.logprobs, strict=True):
            live.append(sample, token, scores, now)
