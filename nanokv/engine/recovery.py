"""Recovery: requests, pages and states after a step that has failed, or that Ctrl-C has interrupted."""

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
    """Ends the requests of a step or sends them back to the queue; the engine goes on with the others."""

    def __init__(
        self, scheduler: Scheduler, cache: CacheManager, outputs: OutputProcessor, transfers: Transfers
    ) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._outputs = outputs
        self._transfers = transfers

    def fail(self, requests: Iterable[Request], error: Exception) -> None:
        """Ends these requests and their siblings with "error". Called in the handler of `error`, which it logs."""
        logger.exception("a step failed; its requests end with an error")
        for request in self._outputs.of(requests):
            self._outputs.finish(request, "error", f"{type(error).__name__}: {error}")

    def undo(self, plan: StepPlan, steps: Iterable[Step]) -> None:
        """Undoes an interrupted step and the steps in flight: their requests compute the same tokens again."""
        for request in [sample for request_id in self._outputs for sample in self._outputs.of_id(request_id)]:
            if request.finish_reason is not None:  # the interrupt came while the sample ended
                self._outputs.finish(request, request.finish_reason, request.error)
        in_flight = [request for step in steps for request in step.requests]
        # A plan that was interrupted has admitted requests whose transfers will not start.
        admitted = [one for one in self._scheduler.running if one.in_transfer and one not in self._transfers]
        requests = self._outputs.of([*plan.all_requests, *in_flight, *admitted])
        for request in requests:
            request.in_flight = None
        for request in [request for request in reversed(self._scheduler.running) if request in requests]:
            if not (request.in_transfer and self._transfers.abort(request)):
                self._scheduler.preempt(request)
        self.lose_states(plan)

    def lose_states(self, plan: StepPlan) -> None:
        """Drops the states whose copies the plan lists and no step has made; requests that work on one start again."""
        if plan.moves.done:
            return
        lost = {destination for _, destination in plan.moves.states}
        for request in [one for one in reversed(self._scheduler.running) if one.held.state_id in lost]:
            self._scheduler.preempt(request)
        self._cache.lose_states(lost)
