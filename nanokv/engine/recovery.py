"""What happens to requests, pages and states when a step fails, or Ctrl-C ends it in the middle."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from nanokv.cache.manager import CacheManager
from nanokv.core.request import Request
from nanokv.engine.output_processor import OutputProcessor
from nanokv.engine.scheduler import Scheduler, StepPlan
from nanokv.engine.step import Step
from nanokv.engine.transfers import Transfers

logger = logging.getLogger("nanokv")


class Recovery:
    """Ends or sends back the requests of a step; the engine goes on with the others."""

    def __init__(
        self, scheduler: Scheduler, cache: CacheManager, outputs: OutputProcessor, transfers: Transfers
    ) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._outputs = outputs
        self._transfers = transfers

    def fail(self, requests: Iterable[Request], error: Exception) -> None:
        """These requests end with "error"; their siblings do, too."""
        logger.exception("a step failed; its requests end with an error")
        for request in self._outputs.of(requests):
            self._outputs.finish(request, "error", f"{type(error).__name__}: {error}")

    def undo(self, plan: StepPlan, steps: Iterable[Step]) -> None:
        """Everything that is planned or in flight counts as never begun; its requests compute it again."""
        in_flight = [request for step in steps for request in step.requests]
        requests = self._outputs.of([*plan.all_requests, *in_flight])
        for request in requests:
            request.in_flight = None
        for request in [request for request in reversed(self._scheduler.running) if request in requests]:
            if not (request.in_transfer and self._transfers.abort(request)):
                self._scheduler.preempt(request)
        self.lose_states(plan)

    def lose_states(self, plan: StepPlan) -> None:
        """Drops the checkpoints whose copies were listed and not made."""
        if plan.moves.done:
            return
        lost = {destination for _, destination in plan.moves.states}
        for request in [one for one in reversed(self._scheduler.running) if one.held.state_id in lost]:
            self._scheduler.preempt(request)
        self._cache.lose_states(lost)
