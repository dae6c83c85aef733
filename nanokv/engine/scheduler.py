"""Scheduler: which tokens of which requests the next step computes. Knows the contract of a cache, and no tensors.

There is no prefill mode and no decode mode. A request has `num_to_compute` tokens left; the step has a budget. Running
requests come first, those that decode before those that prefill, so that no next token waits for a long prompt. Then
waiting requests are admitted while budget, slots and pages last, in the order of admission_policy.py.

    waiting --admit: match, reserve--> running --resolve: a stop--> finished
       ^                                  |
       +------- preempt: release ---------+      (newest first; its tokens are kept, its pages recomputed)

A running request may be in transfer: a connector brings its pages (connector.py). It is neither planned nor preempted.
No livelock: the oldest running request is never preempted for another, and any request fits in the pool alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from nanokv.cache.contract import Cache, Moves
from nanokv.core.config import EngineConfig
from nanokv.core.events import Events, Preempted
from nanokv.core.request import Request
from nanokv.engine.admission_policy import AdmissionPolicy
from nanokv.engine.connector import PageSource

LOOK_AHEAD = 64
"""Most waiting requests that one plan considers: bounds its work for a long queue."""
SCORE_ROWS = 256
"""Most rows of one scored request in a step: the logits of 256 x 49,152 floats are 48 MiB."""


@dataclass
class StepPlan:
    """The work of one step: run `moves`, start `transfers`, (request, tokens it will have), and compute `requests`, in
    row order, each with num_scheduled > 0."""

    requests: list[Request] = field(default_factory=list)
    transfers: list[tuple[Request, int]] = field(default_factory=list)
    moves: Moves = field(default_factory=Moves)

    @property
    def all_requests(self) -> list[Request]:
        """The requests that are computed, and those whose transfers start."""
        return [*self.requests, *(request for request, _ in self.transfers)]

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return sum(request.num_scheduled for request in self.requests)


class Scheduler:
    """Keeps the waiting and the running requests, and plans one step at a time. A `source` can bring pages."""

    def __init__(self, config: EngineConfig, cache: Cache, events: Events, source: PageSource | None = None) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._config = config
        self._cache = cache
        self._events = events
        self._source = source
        self._policy = AdmissionPolicy(config, cache)

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.waiting.append(request)

    def join(self, request: Request) -> None:
        """Runs a sample that was forked from a running request: it has its pages already."""
        self.running.append(request)

    def remove(self, request: Request) -> None:
        """Removes a finished or aborted request and releases its pages. A request in transfer stays until the transfer
        is collected: its pages are quarantined until then."""
        if request.in_transfer and self._source is not None and self._source.abort(request):
            return
        request.in_transfer = False
        if request in self.running:
            self.running.remove(request)
            self._cache.release(request)
        elif request in self.waiting:
            self.waiting.remove(request)
            self._policy.forget(request)

    def preempt(self, request: Request) -> None:
        """Back to the head of the queue: its tokens are kept, its pages released; published ones may match again."""
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.num_preemptions += 1
        request.in_transfer = False
        self._cache.release(request)
        request.num_scheduled = 0
        if self._events:
            self._events.emit(Preempted(request.id, request.index))

    def restart(self, waiting: Iterable[Request], running: Iterable[Request]) -> None:
        """Forgets all requests, and takes these, which hold no pages or are in transfer."""
        self.waiting, self.running = deque(waiting), list(running)
        self._policy = AdmissionPolicy(self._config, self._cache)
        for request in self.waiting:
            request.num_scheduled, request.in_flight, request.in_transfer = 0, None, False

    def plan(self) -> StepPlan:
        """The next step; empty when there is nothing to do. Reserves pages, may preempt, may admit."""
        plan = StepPlan()
        budget = self._config.max_step_tokens
        num_preemptions = self.num_preemptions
        for request in sorted(self.running, key=lambda request: request.is_prefilling):
            if budget <= 0 or request not in self.running:  # preempted just now, to make room for another
                continue
            if request.in_transfer or request.num_to_compute == 0:  # waits for pages, or for a token in flight
                continue
            wanted = self._chunk(request, budget)
            if self._make_room(request, wanted, plan):
                request.num_scheduled = wanted
                plan.requests.append(request)
            budget = self._config.max_step_tokens - plan.num_tokens
        if num_preemptions == self.num_preemptions:
            self._admit(plan, budget)
        plan.moves = self._cache.drain_moves()
        return plan

    def _chunk(self, request: Request, budget: int) -> int:
        """How many tokens of a request this step computes."""
        wanted = min(request.num_to_compute, budget, SCORE_ROWS if request.wants_all_logits else budget)
        return self._cache.limit_chunk(request, wanted)

    def _make_room(self, request: Request, wanted: int, plan: StepPlan) -> bool:
        """Reserves pages, preempting the newest requests while it takes; False when `request` itself was preempted."""
        while not self._cache.reserve(request, wanted):
            victim = next(other for other in reversed(self.running) if not other.in_transfer)
            if victim in plan.requests:
                plan.requests.remove(victim)
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def _admit(self, plan: StepPlan, budget: int) -> None:
        slots = self._config.max_requests - sum(1 + request.num_forks for request in self.running)
        queue = [self.waiting[place] for place in range(min(LOOK_AHEAD, len(self.waiting)))]
        admitted = []
        for request in self._policy.order(queue) if budget > 0 and slots > 0 else ():
            if budget <= 0 or slots < 1 + request.num_forks:
                break
            found = 0 if request.wants_all_logits else self._cache.prefix_length(request)
            if self._policy.waits_for_prefix(request, found, self.running):
                continue
            upto = found if self._source is None else self._source.offers(request, found)
            wanted = self._reserve_first(request, budget, found, upto)
            if wanted == 0:
                break
            self.waiting.remove(request)
            self._policy.forget(request)
            self.running.append(request)
            admitted.append(request)
            if upto > found:
                request.in_transfer = True
                plan.transfers.append((request, upto))
            else:
                request.num_scheduled = wanted
                plan.requests.append(request)
                budget -= wanted
            slots -= 1 + request.num_forks
        self._policy.note(queue, admitted)

    def _reserve_first(self, request: Request, budget: int, found: int, upto: int) -> int:
        """Matches a request and reserves the pages of its first chunk.

        budget    most tokens of the chunk
        upto      more than `found`: a connector brings the tokens up to here, and pages are reserved for all of them
        Returns   tokens of the chunk; 0 where there are too few pages, and then the request holds none
        """
        if not self._has_room(request, found // self._config.page_size):
            return 0
        reserved = 0
        try:
            start = self._cache.match(request)
            wanted = upto - start if upto > found else self._chunk(request, budget)
            # Checked again: the match may hold pages that were evictable before it.
            if self._has_room(request, len(request.held.pages)) and self._cache.reserve(request, wanted):
                reserved = wanted
        finally:
            if not reserved:
                self._cache.release(request)
        return reserved

    def _has_room(self, request: Request, found_pages: int) -> bool:
        """Whether all its known tokens fit beside what running requests have been promised and one page more for each:
        an admitted request should not have to be preempted at once."""
        if not self.running:
            return True
        promised = sum(self._cache.pages_for(other.num_tokens) - len(other.held.pages) + 1 for other in self.running)
        needed = self._cache.pages_for(request.num_tokens + 1) - found_pages
        return needed + promised <= self._cache.num_available
