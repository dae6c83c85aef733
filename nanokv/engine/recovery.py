"""Recovery: requests, pages and states after a step that has failed, or that was interrupted."""

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

    def undo(self, steps: Iterable[Step]) -> None:
        """Undoes a step whose forward pass was interrupted, and those in flight; the prefix tree stays."""
        in_flight = {request for step in steps for request in step.requests}
        for request in in_flight:
            request.in_flight = None
        for request in list(reversed(self._scheduler.running)):
            if request.num_scheduled or (request in in_flight and not request.in_transfer):
                self._scheduler.preempt(request)

    def rebuild(self) -> None:
        """Makes the books anew from the live requests, after an interrupt between any two lines of the engine, or an
        exception in the middle of a plan.

        Every live request is queued and computes the same tokens again. The prefix tree is empty. Pages into which a
        connector may still write stay with their requests.
        """
        logger.warning("a change of the cache was cut short: the prefix cache starts again, empty")
        kept = self._transfers.abort_all()
        self._cache.rebuild(kept)
        samples = [sample for request_id in self._outputs for sample in self._outputs.of_id(request_id)]
        self._scheduler.restart([sample for sample in samples if sample not in kept], kept)
        for sample in samples:
            if sample.finish_reason is not None:  # the interrupt came while the sample ended
                self._outputs.finish(sample, sample.finish_reason, sample.error)
            else:
                self._rewind(sample)
        self._outputs.drop_ended()

    def _rewind(self, sample: Request) -> None:
        """Takes back everything that no output has shown: a token, its text, and a fork that has begun."""
        num_shown = sample.num_delivered
        del sample.tokens[sample.num_prompt + num_shown :]
        del sample.metrics.token_times[num_shown:]
        if sample.logprobs is not None:
            del sample.logprobs[num_shown:]
        if sample.text_stream is not None:
            sample.text_stream = sample.text_stream.restarted()
            for place, token in enumerate(sample.tokens[sample.num_prompt :]):
                sample.text_stream.push(token, place + 1 >= sample.params.min_tokens)
                sample.text_stream.take_delta()
        live = {other.index for other in self._outputs.of([sample])}
        sample.num_forks = len(set(range(sample.index + 1, sample.index + sample.num_forks + 1)) - live)

    def lose_states(self, plan: StepPlan) -> None:
        """Drops the states whose copies the plan lists and no step has made; requests that work on one start again."""
        if plan.moves.done:
            return
        lost = {destination for _, destination in plan.moves.states}
        for request in [one for one in reversed(self._scheduler.running) if one.held.state_id in lost]:
            self._scheduler.preempt(request)
        self._cache.lose_states(lost)
