"""AdmissionPolicy: the order in which waiting requests are admitted. Knows prefix lengths, and no pages.

Three rules: the configured order ("fcfs" or "longest-prefix"); ageing, so that no request waits for ever; and waiting
for a shared prefix that a running request is computing.
Source: the in-batch prefix caching of SGLang's scheduler.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nanokv.cache.contract import Cache
from nanokv.core.config import EngineConfig
from nanokv.core.request import Request

MIN_SHARED = 32
"""Least tokens that a request must share with a prefix in progress before it waits for it."""
MAX_PASSED_OVER = 100
"""Plans that may admit a later request before a waiting one is aged: aged requests come first."""


class AdmissionPolicy:
    """Counts and waits of waiting requests, kept until `forget`.

    config   EngineConfig: schedule, prefix_cache and page_size are used
    cache    Cache, for prefix lengths and checkpoints
    """

    def __init__(self, config: EngineConfig, cache: Cache) -> None:
        self._config = config
        self._cache = cache
        self._passed_over: dict[Request, int] = {}  # plans that admitted a later request
        self._waits_for: dict[Request, tuple[Request, int]] = {}  # (running request, tokens shared with it)

    def order(self, queue: list[Request]) -> list[Request]:
        """The requests of `queue`, which is in order of arrival, in order of admission."""
        if self._config.schedule == "fcfs":
            return queue
        fresh = [request for request in queue if not self._is_aged(request)]
        fresh.sort(key=self._cache.prefix_length, reverse=True)
        return [request for request in queue if self._is_aged(request)] + fresh

    def waits_for_prefix(self, request: Request, found: int, running: list[Request]) -> bool:
        """Whether a running request computes a prefix that `request` shares beyond the `found` tokens in the cache.

        The running requests are searched each time, so the abort or preemption of one needs no bookkeeping here.
        """
        if not self._config.prefix_cache or request.wants_all_logits or self._is_aged(request):
            return False
        page_size = self._config.page_size
        if request in self._waits_for:
            other, shared = self._waits_for[request]
            if other in running and shared > other.held.num_published * page_size:
                return True
            del self._waits_for[request]
        for other in running:
            if not other.is_prefilling or other.params.cache_salt != request.params.cache_salt:
                continue
            shared = common_prefix(request, other) // page_size * page_size
            worth_it = shared - max(other.held.num_published * page_size, found) >= MIN_SHARED
            if worth_it and self._cache.request_checkpoint(other, shared):
                self._waits_for[request] = (other, shared)
                return True
        return False

    def note(self, queue: list[Request], admitted: Iterable[Request]) -> None:
        """Ages the requests of `queue` that precede an admitted one."""
        places = [queue.index(request) for request in admitted]
        for request in queue[: max(places, default=0)]:
            if request not in admitted:
                self._passed_over[request] = self._passed_over.get(request, 0) + 1

    def forget(self, request: Request) -> None:
        """Drops the counts of a request that does not wait any more."""
        self._passed_over.pop(request, None)
        self._waits_for.pop(request, None)

    def _is_aged(self, request: Request) -> bool:
        return self._passed_over.get(request, 0) >= MAX_PASSED_OVER


def common_prefix(request: Request, other: Request) -> int:
    """Tokens that both begin with, less one if no token of `request` were left to compute; 0 where their first
    MIN_SHARED tokens differ."""
    length = min(request.num_tokens - 1, other.num_tokens)
    if request.tokens[:MIN_SHARED] != other.tokens[:MIN_SHARED]:
        return 0
    differs = np.frombuffer(request.tokens, np.int32)[:length] != np.frombuffer(other.tokens, np.int32)[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length
