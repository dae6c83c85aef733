"""Scheduler: which tokens of which requests the next step computes. Knows the four verbs of a cache, and no tensors.

There is no prefill mode and no decode mode. A request has `num_to_compute` tokens left; the step has a budget. Running
requests come first, those that decode before those that still read their prompt, so that nobody's next token waits for
somebody's long prompt. Then waiting requests are admitted while budget, slots and pages last.

    waiting --admit: match, reserve--> running --resolve: a stop--> finished
       ^                                  |
       +------- preempt: release ---------+      (newest first; its tokens are kept, its pages recomputed)

A running request may be remote: another process computes its prompt (remote.py). It is neither planned nor preempted.

No livelock: the oldest running request is never preempted for another, and any request fits in the pool alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from nanokv.cache.manager import Cache
from nanokv.core.config import EngineConfig
from nanokv.core.events import EventLog
from nanokv.core.request import Request
from nanokv.engine.remote import Prefiller

MIN_SHARED = 32
"""Tokens that must be shared with a prefix in the making before a request waits for it."""
MAX_PASSED_OVER = 100
"""Plans that may admit a later request instead before a waiting one has its turn (ageing)."""
LOOK_AHEAD = 64
"""Waiting requests that one plan looks at: bounds its work, however long the queue is."""
SCORE_ROWS = 256
"""Rows of one step whose full logits are asked for: 256 x 49,152 floats are 48 MiB."""


@dataclass
class StepPlan:
    """What one step does: `requests` in row order (each with num_scheduled > 0); pages and states to copy before it;
    `remote`: requests to hand over to another process once these copies are made."""

    requests: list[Request] = field(default_factory=list)
    remote: list[Request] = field(default_factory=list)
    page_copies: list[tuple[int, int]] = field(default_factory=list)
    state_copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(request.num_scheduled for request in self.requests)


class Scheduler:
    """Keeps the waiting and the running requests, and plans one step at a time."""

    def __init__(
        self, config: EngineConfig, cache: Cache, events: EventLog, prefiller: Prefiller | None = None
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._config = config
        self._cache = cache
        self._events = events
        self._prefiller = prefiller
        self._passed_over: dict[Request, int] = {}
        self._waits_for: dict[Request, tuple[Request, int]] = {}

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def join(self, request: Request) -> None:
        """A sample forked from a running request runs at once: its pages are there."""
        self.running.append(request)

    def remove(self, request: Request) -> None:
        """Take a finished or aborted request out, wherever it is, and give its pages back.

        One that is out of the house stays until it is collected: its pages are not free before.
        """
        if request.is_remote and self._prefiller.abort(request):
            return
        request.is_remote = False
        if request in self.running:
            self.running.remove(request)
            self._cache.release(request)
        else:
            self.waiting.remove(request)
            self._forget(request)

    def preempt(self, request: Request) -> None:
        """Back to the head of the queue: its tokens stay known, its pages go; what was published may match again."""
        self.running.remove(request)
        self._cache.release(request)
        request.num_scheduled, request.is_remote = 0, False
        self.waiting.appendleft(request)
        self.num_preemptions += 1
        if self._events.on:
            self._events.write("preempt", request=request.request_id, index=request.index)

    def plan(self) -> StepPlan:
        """The next step; empty when there is nothing to do. Reserves pages, may preempt, may admit."""
        plan = StepPlan()
        budget = self._config.max_step_tokens
        num_preemptions = self.num_preemptions
        for request in sorted(self.running, key=lambda request: request.is_prefilling):
            if budget <= 0 or request not in self.running:  # preempted just now, to make room for another
                continue
            if request.is_remote or request.num_to_compute == 0:  # waits for another process, or for a token in flight
                continue
            wanted = self._chunk(request, budget)
            if self._make_room(request, wanted, plan):
                request.num_scheduled = wanted
                plan.requests.append(request)
            budget = self._config.max_step_tokens - plan.num_tokens
        if num_preemptions == self.num_preemptions:
            self._admit(plan, budget)
        plan.page_copies = self._cache.take_copies()
        plan.state_copies = self._cache.take_state_copies()
        return plan

    def _chunk(self, request: Request, budget: int) -> int:
        """How many tokens of a request to compute in this step."""
        wanted = min(request.num_to_compute, budget, SCORE_ROWS if request.wants_all_logits else budget)
        return self._cache.chunk(request, wanted)

    def _make_room(self, request: Request, wanted: int, plan: StepPlan) -> bool:
        """Reserve pages, preempting the newest requests while it takes; False when `request` itself had to go."""
        while not self._cache.reserve(request, wanted):
            victim = next(other for other in reversed(self.running) if not other.is_remote)
            if victim in plan.requests:
                plan.requests.remove(victim)
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def _admit(self, plan: StepPlan, budget: int) -> None:
        slots = self._config.max_requests - sum(1 + request.num_forks for request in self.running)
        if budget <= 0 or slots <= 0 or not self.waiting:
            return
        queue = [self.waiting[place] for place in range(min(LOOK_AHEAD, len(self.waiting)))]
        admitted = []
        for request in self._admission_order(queue):
            if budget <= 0 or slots < 1 + request.num_forks:
                break
            found = 0 if request.wants_all_logits else self._cache.prefix_length(request)
            if self._waits_for_prefix(request, found):
                continue
            is_remote = self._prefiller is not None and self._prefiller.wants(request, request.num_tokens - found)
            wanted = self._reserve_first(request, None if is_remote else budget, found)
            if wanted == 0:
                break
            self.waiting.remove(request)
            self._forget(request)
            self.running.append(request)
            admitted.append(request)
            if is_remote:
                request.is_remote = True
                plan.remote.append(request)
            else:
                request.num_scheduled = wanted
                plan.requests.append(request)
                budget -= wanted
            slots -= 1 + request.num_forks
        if admitted:
            last = max(place for place, request in enumerate(queue) if request in admitted)
            for request in queue[:last]:
                if request not in admitted:
                    self._passed_over[request] = self._passed_over.get(request, 0) + 1

    def _reserve_first(self, request: Request, budget: int | None, found: int) -> int:
        """Match, and pages for the first chunk; returns its tokens, or 0 with nothing held where there is no room.

        budget   tokens of the chunk at most; None: pages for all known tokens, whoever computes them
        """
        if not self._has_room(request, found // self._config.page_size):
            return 0
        try:
            self._cache.match(request)
            wanted = request.num_to_compute if budget is None else self._chunk(request, budget)
            # Asked again: what was evictable before the match may be the very pages that the match now holds.
            if self._has_room(request, len(request.pages)) and self._cache.reserve(request, wanted):
                return wanted
        except BaseException:
            self._cache.release(request)
            raise
        self._cache.release(request)
        return 0

    def _has_room(self, request: Request, found_pages: int) -> bool:
        """Whether all its known tokens fit beside what running requests have been promised and one page more for each:
        who is admitted should not have to be preempted at once."""
        if not self.running:
            return True
        promised = sum(self._cache.pages_for(other.num_tokens) - len(other.pages) + 1 for other in self.running)
        needed = self._cache.pages_for(request.num_tokens + 1) - found_pages
        return needed + promised <= self._cache.num_available

    def _admission_order(self, queue: list[Request]) -> list[Request]:
        if self._config.schedule == "fcfs":
            return queue
        fresh = [request for request in queue if not self._is_aged(request)]
        fresh.sort(key=self._cache.prefix_length, reverse=True)
        return [request for request in queue if self._is_aged(request)] + fresh

    def _is_aged(self, request: Request) -> bool:
        return self._passed_over.get(request, 0) >= MAX_PASSED_OVER

    def _waits_for_prefix(self, request: Request, found: int) -> bool:
        """Whether a running request computes a prefix that `request` shares beyond the `found` tokens in the cache.

        The prefix in the making is read off the requests that prefill, so an abort or a preemption releases whoever
        waits without any bookkeeping. (In-batch prefix caching of SGLang's scheduler.)
        """
        if not self._config.prefix_cache or request.wants_all_logits:
            return False
        if self._is_aged(request):
            return False
        page_size = self._config.page_size
        if request in self._waits_for:
            other, shared = self._waits_for[request]
            if other in self.running and shared > other.num_published * page_size:
                return True
            del self._waits_for[request]
        for other in self.running:
            if not other.is_prefilling or other.params.cache_salt != request.params.cache_salt:
                continue
            shared = _common_prefix(request, other) // page_size * page_size
            worth_it = shared - max(other.num_published * page_size, found) >= MIN_SHARED
            if worth_it and self._cache.expect(other, shared):
                self._waits_for[request] = (other, shared)
                return True
        return False

    def _forget(self, request: Request) -> None:
        self._passed_over.pop(request, None)
        self._waits_for.pop(request, None)


def _common_prefix(request: Request, other: Request) -> int:
    """Tokens that both begin with, leaving `request` at least one to compute."""
    length = min(request.num_tokens - 1, other.num_tokens)
    if request.tokens[:MIN_SHARED] != other.tokens[:MIN_SHARED]:
        return 0
    differs = np.frombuffer(request.tokens, np.int32)[:length] != np.frombuffer(other.tokens, np.int32)[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length
