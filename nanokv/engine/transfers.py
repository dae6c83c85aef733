"""Transfers: requests whose pages a connector fills, from their start to their end. Knows any number of connectors."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

from nanokv.cache.contract import Moves
from nanokv.cache.manager import CacheManager
from nanokv.cache.store import CacheStore
from nanokv.core.events import Events, TransferStarted
from nanokv.core.request import Request
from nanokv.engine.connector import Connector, Delivery
from nanokv.engine.output_processor import OutputProcessor
from nanokv.engine.scheduler import Scheduler

logger = logging.getLogger("nanokv")

MAX_ATTEMPTS = 2
"""Transfers of a request that may deliver nothing before the engine computes its prompt."""
Fail = Callable[[Iterable[Request], Exception], None]
"""Ends requests with an error."""


class Transfers:
    """Several connectors as one PageSource. The largest offer wins, and of equal offers the first connector's."""

    def __init__(self, connectors: Sequence[Connector]) -> None:
        self.connectors = tuple(connectors)
        self._chosen: WeakKeyDictionary[Request, Connector] = WeakKeyDictionary()  # whose offer was the largest
        self._owners: dict[Request, tuple[Connector, int]] = {}  # of each request in transfer, and its `upto`

    def __contains__(self, request: Request) -> bool:
        """Whether a connector has the request."""
        return request in self._owners

    def offers(self, request: Request, found: int) -> int:
        """Tokens that the best connector can bring; `found`: none."""
        best = found
        for connector in self.connectors:
            if request.num_attempts >= MAX_ATTEMPTS or request.wants_all_logits:
                break
            try:
                offer = min(connector.offers(request, found), request.num_tokens)
            except Exception:
                logger.exception("a connector failed to make an offer, which counts as none")
                continue
            if offer > best:
                best, self._chosen[request] = offer, connector
        return best

    def abort(self, request: Request) -> bool:
        """Cancels a transfer. True: the request's pages stay quarantined until it is collected."""
        if request not in self._owners:
            return False
        try:
            is_writing = self._owners[request][0].abort(request)
        except Exception:
            logger.exception("a connector failed to abort a transfer, and may still write")
            is_writing = True
        if not is_writing:
            del self._owners[request]
        return is_writing

    def abort_all(self) -> list[Request]:
        """Cancels every transfer. Returns the requests whose pages stay quarantined until they are collected."""
        return [request for request in list(self._owners) if self.abort(request)]

    def start(self, waiting: list[tuple[Request, int]], cache: CacheManager, events: Events, fail: Fail) -> None:
        """Starts the transfers (request, upto) of a plan, whose moves have run, and removes them from the list.

        A request whose connector fails to start ends with an error; pages that it may still write stay quarantined.
        """
        while waiting:
            request, upto = waiting[0]
            request.metrics.first_scheduled = request.metrics.first_scheduled or time.perf_counter()
            request.num_attempts += 1
            try:
                owner = self._chosen.pop(request)
                self._owners[request] = owner, upto
                owner.start(request, upto, cache.reserve_checkpoints(request, upto))
            except Exception as error:
                fail([request], error)
            waiting.pop(0)
            if events and request.finish_reason is None:
                events.emit(TransferStarted(request.id, request.index, list(request.held.pages)))

    def save(self, moves: Moves, store: CacheStore) -> None:
        """Lets every connector copy the pages that are about to be overwritten. One that fails keeps none of them."""
        for connector in self.connectors if moves.saves else ():
            try:
                connector.save(moves, store)
            except Exception:
                logger.exception("a connector failed to save %d pages and does not keep them", len(moves.saves))

    def collect(
        self, wait: bool, scheduler: Scheduler, cache: CacheManager, outputs: OutputProcessor, fail: Fail
    ) -> None:
        """Takes the transfers that have ended: their requests run on from the tokens that came.

        wait   if none has ended, wait a moment for one
        """
        queues = [self._collected(connector, False) for connector in self.connectors]
        for place, connector in enumerate(self.connectors):
            if wait and not any(queues):
                queues[place] = self._collected(connector, True)
        for arrived in queues:
            while arrived:  # each leaves the connector alone, so that an error loses none behind it
                request = arrived[0].request
                try:
                    self._join(arrived[0], scheduler, cache, outputs)
                except Exception as error:
                    fail([request], error)
                finally:
                    arrived.popleft()

    def _collected(self, connector: Connector, wait: bool) -> deque[Delivery]:
        try:
            return connector.collect(wait)
        except Exception:
            logger.exception("a connector failed to collect transfers, which are asked for again")
            return deque()

    def _join(self, delivery: Delivery, scheduler: Scheduler, cache: CacheManager, outputs: OutputProcessor) -> None:
        request = delivery.request
        _, upto = self._owners.pop(request, (None, 0))
        num_tokens = min(delivery.num_tokens, upto)
        request.in_transfer = False
        if request.finish_reason is not None:  # aborted meanwhile: its pages are free from here on
            scheduler.remove(request)
        elif num_tokens <= request.num_computed:
            scheduler.preempt(request)
        elif None in delivery.tokens:  # such pages are never published
            outputs.append(request, None, None, time.perf_counter())
        elif not delivery.tokens:
            request.num_attempts = 0
            cache.adopt(request, min(num_tokens, request.num_tokens - 1))
        else:
            request.num_attempts = 0
            cache.adopt(request, request.num_tokens)
            siblings, now = outputs.siblings(request), time.perf_counter()
            outputs.fork(request, siblings)
            for sample, token, scores in zip([request, *siblings], delivery.tokens, delivery.logprobs, strict=True):
                outputs.append(sample, token, scores, now)

    def close(self) -> None:
        """Closes every connector; the next `collect` returns all requests in transfer."""
        for connector in self.connectors:
            connector.close()

    def stats(self) -> dict[str, int | float]:
        """The numbers of all connectors (core/stats.py)."""
        total: Counter[str] = Counter()
        for connector in self.connectors:
            total.update(connector.stats())
        return dict(total)
